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
        held = min((_beginning(text, stop) for stop in self._stops), default=len(text))
        self._held = text[held:]
        return text[:held]

    def finish(self) -> str:
        """The stream is over: returns what was held back (nothing after a match)."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str, stop: str) -> int:
    """Where the longest end of the text begins that is a beginning of the stop string; the text's end if none is."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return at if at >= 0 else len(text)
