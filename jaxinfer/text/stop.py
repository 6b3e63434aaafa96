"""Stop strings in streamed text."""

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Cuts a stream of text pieces at the first stop string that is complete.

    Text that could be the beginning of a stop string is held back until it is clear what it is, so no part of a stop
    string leaks. Of several, the one that ends first in the text counts, and of those that end together the longest:
    the outcome doesn't depend on how the text was cut into pieces.

        stops = StopStrings(["\\n\\n", "User:"])
        text = stops.push(piece)         # what may be shown
        if stops.matched is not None: ...  # stop; all later pushes return ""
        text = stops.finish()            # the stream ended by itself: what was held back

    `include_stop_str_in_output` keeps the stop string itself at the end of the text. Raises ValueError for an empty
    stop string or one that is not a string.
    """

    def __init__(self, stops: Sequence[str] | str, include_stop_str_in_output: bool = False) -> None:
        stops = [stops] if isinstance(stops, str) else list(stops)
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"stop: each stop string must be a non-empty string, found {stop!r}")
        self.matched: str | None = None
        self._stops = stops
        self._include = include_stop_str_in_output
        self._beginnings = {stop[:i] for stop in stops for i in range(1, len(stop))}
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str, may_end: bool = True) -> str:
        """Takes the next piece; returns the text that is now certain to come before any stop string. Unless it
        `may_end`, no stop string that is complete in it counts."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        before = len(self._held)
        text = self._held + text
        matches = [
            (at + len(stop), at, stop)
            for stop in self._stops
            if may_end and (at := text.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if matches:
            end, start, self.matched = min(matches)
            self._held = ""
            return text[: end if self._include else start]
        for size in range(min(len(text), self._longest - 1), 0, -1):
            if text[-size:] in self._beginnings:
                self._held = text[-size:]
                return text[:-size]
        self._held = ""
        return text

    def finish(self) -> str:
        """The stream is over: returns what was held back (nothing after a match)."""
        held, self._held = self._held, ""
        return held
