"""How likely given texts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from jaxinfer.engine.outputs import ScoreOutput, score_error
from jaxinfer.engine.prompts import Prompt, plain_prompt, prompt_list
from jaxinfer.engine.scoring import (
    Scoring,
    encode_pair,
    encode_text,
    join_windows,
    prefix_token_id,
    rolling_windows,
    text_ids,
)
from jaxinfer.errors import RequestError, UnsupportedError, placed
from jaxinfer.sampling.ids import are_ids
from jaxinfer.tasks.task import Task, for_each

Text = str | Sequence[int]
Scorable = Prompt | tuple[Prompt, Text]  # a text, or a prompt and its continuation


class Pair(NamedTuple):
    """A scorable as tokens.

    text: what is scored; None where ids were given.
    context: ids that are given.
    scored: ids that are scored.
    adapter: see Encoded.
    """

    text: str | None
    context: list[int]
    scored: list[int]
    adapter: Any = None


@dataclass(frozen=True)
class TextAsked:
    """A text to score.

    index: its place in the input.
    scorable: as it was given, or encoded.
    adapter: see Encoded; what is encoded has its own.
    """

    index: int
    scorable: Scorable | Pair
    adapter: Any = None


class ScoreTask(Task[TextAsked, ScoreOutput]):
    """Texts, and pairs of a prompt and a continuation, to log-probabilities."""

    noun = "text"
    done = "Scored"

    def checked(self, asked: TextAsked) -> TextAsked:
        pair = self._pair(asked)
        self.engine.check_scoring([*pair.context, *pair.scored], len(pair.context))
        self.engine.check_adapter(pair.adapter)
        return replace(asked, scorable=pair)

    def request(self, asked: TextAsked) -> Scoring:
        text, context, scored, adapter = self._pair(asked)
        return self.engine.new_scoring([*context, *scored], len(context), text, adapter)

    def failure(self, asked: TextAsked, error: ValueError) -> ScoreOutput:
        return score_error(asked.index, str(error))

    def rolling(self, texts: Any, shown: bool, adapter: Any = None) -> list[ScoreOutput]:
        """Texts of any length, in windows of the longest context, as lm-eval cuts them; each token is scored once, the
        first one after BOS (or EOS). Raises ValueError for an empty text."""
        asked: list[TextAsked] = []
        windows: list[range] = []
        listed: list[Any] = prompt_list(texts)
        first = prefix_token_id(self.tokenizer)
        adapters = for_each("adapter", adapter, listed)
        for i, text in enumerate(listed):
            try:
                ids = text_ids(text, self.tokenizer, add_special_tokens=False)
            except ValueError as error:
                raise placed(f"text {i}", error) from None
            if not ids:
                raise RequestError(f"text {i} is empty: there is nothing to score", "text")
            start = len(asked)
            pairs = rolling_windows(ids, first, self.engine.max_model_len)
            asked += [TextAsked(start + n, pair, adapters[i]) for n, pair in enumerate(pairs)]
            windows.append(range(start, len(asked)))
        parts = self.run_all(asked, "raise", shown)
        return [
            join_windows(i, text if isinstance(text, str) else None, parts[places.start : places.stop])
            for i, (text, places) in enumerate(zip(listed, windows, strict=True))
        ]

    def _pair(self, asked: TextAsked) -> Pair:
        scorable = asked.scorable
        if isinstance(scorable, Pair):
            return scorable
        if isinstance(scorable, tuple) and len(scorable) == 2 and not are_ids(scorable):
            prompt, scored = cast(tuple[Prompt, Text], scorable)
            given, said = plain_prompt(prompt, self.tokenizer)
            ids = encode_pair(given, scored, self.tokenizer)
        else:
            scored, said = plain_prompt(cast(Prompt, scorable), self.tokenizer)
            ids = encode_text(scored, self.tokenizer)
        if "cache_salt" in said:
            raise UnsupportedError("cache_salt is given: texts that are scored have none; leave it out", "cache_salt")
        return Pair(scored if isinstance(scored, str) else None, *ids, said.get("adapter", asked.adapter))


def texts_asked(texts: Any, continuations: Any = None, adapter: Any = None) -> list[TextAsked]:
    """Texts, or with continuations, each of them after its prompt, or all after one; with an adapter for all or one
    each. Raises ValueError."""
    scorables: list[Any] = prompt_list(texts)
    if continuations is not None:
        following: list[Any] = prompt_list(continuations)
        if len(scorables) == 1:
            scorables *= len(following)
        if len(scorables) != len(following):
            raise RequestError.at("continuations", f"{len(following)} for {len(scorables)} prompts; give one each")
        scorables = list(zip(scorables, following, strict=True))
    adapters = for_each("adapter", adapter, scorables)
    return [TextAsked(i, *fields) for i, fields in enumerate(zip(scorables, adapters, strict=True))]
