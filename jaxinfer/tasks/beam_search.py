"""Beam search, with transformers' definitions of candidates, scores and the end (early_stopping=False).

Each round asks the engine for one token of every beam; the prefix cache has all but the last page of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.generation import RequestGroup
from jaxinfer.engine.prompts import Encoded
from jaxinfer.engine.request import FinishReason
from jaxinfer.engine.thread import EngineThread
from jaxinfer.errors import ContextLengthError, RequestError
from jaxinfer.sampling.ids import is_id
from jaxinfer.sampling.params import MAX_LOGPROBS, SamplingParams
from jaxinfer.text.detokenize import Detokenizer

MAX_LENGTH_PENALTY = 32  # either way: no length to this power is too large, or too small, to divide by


@dataclass(frozen=True)
class BeamSearchSequence:
    """A continuation.

    token_ids, text: an EOS id is among the tokens.
    cumulative_logprob: the sum of their log-probabilities.
    score: cumulative_logprob / len(token_ids) ** length_penalty.
    finish_reason: "stop" (EOS) or "length".
    """

    token_ids: list[int]
    text: str
    cumulative_logprob: float
    score: float
    finish_reason: FinishReason


@dataclass(frozen=True)
class BeamSearchOutput:
    """A prompt with its continuations.

    prompt: None where ids were given.
    prompt_token_ids: what was continued.
    sequences: best first.
    error: why there are none.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    sequences: list[BeamSearchSequence]
    error: str | None = None


class Beam(NamedTuple):
    """A hypothesis.

    token_ids: after the prompt.
    logprob: the sum of their log-probabilities.
    """

    token_ids: list[int]
    logprob: float


@dataclass
class Search:
    """The state of one prompt's search.

    prompt: what is continued.
    beams: those that go on, best first.
    finished: with their scores, best first.
    done: no beam can be better any more, or none goes on.
    error: why it was broken off.
    """

    prompt: Encoded
    beams: list[Beam] = field(default_factory=lambda: [Beam([], 0.0)])
    finished: list[tuple[float, Beam]] = field(default_factory=list)
    done: bool = False
    error: str | None = None


def beam_search(
    thread: EngineThread,
    prompts: Sequence[Encoded],
    beam_width: int,
    max_tokens: int,
    length_penalty: float = 1.0,
    ignore_eos: bool = False,
) -> list[BeamSearchOutput]:
    """The `beam_width` best continuations of each prompt, of at most `max_tokens` tokens.

    length_penalty: from -32 to 32; above 0 prefers longer ones. Raises RequestError for widths that need more
    candidates than there are log-probabilities, and for what `Engine.add` refuses.
    """
    engine = thread.engine
    eos = frozenset(() if ignore_eos else engine.eos_token_ids)
    # So many that enough go on even if all that can end do.
    each = max(2, 1 + len(eos))
    widest = MAX_LOGPROBS // each
    if not is_id(beam_width) or not 1 <= beam_width <= widest:
        raise RequestError(
            f"beam_width is {beam_width!r:.60}: it must be from 1 to {widest} with {len(eos)} EOS ids", "beam_width"
        )
    candidates = each * beam_width
    if not is_id(max_tokens) or max_tokens < 1:
        raise RequestError(f"max_tokens is {max_tokens!r:.60}: it must be an integer of at least 1", "max_tokens")
    number = isinstance(length_penalty, int | float) and not isinstance(length_penalty, bool)
    if not number or not abs(length_penalty) <= MAX_LENGTH_PENALTY:
        most = f"it must be a number from -{MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}"
        raise RequestError(f"length_penalty is {length_penalty!r:.60}: {most}", "length_penalty")
    if not isinstance(ignore_eos, bool):
        raise RequestError(f"ignore_eos is {ignore_eos!r:.60}: it must be True or False", "ignore_eos")
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    if longest + max_tokens > engine.max_model_len:
        raise ContextLengthError(
            f"max_tokens is {max_tokens}: with a prompt of {longest} tokens it may be at most "
            f"{engine.max_model_len - longest} (max_model_len {engine.max_model_len})",
            "max_tokens",
        )
    searches = [Search(prompt) for prompt in prompts]
    params = SamplingParams(
        temperature=0.0, max_tokens=1, logprobs=min(candidates, engine.vocab_size), ignore_eos=True, detokenize=False
    )
    for step in range(1, max_tokens + 1):
        open_searches = [search for search in searches if not search.done]
        if not open_searches:
            break
        for search, options in zip(open_searches, _next_tokens(thread, open_searches, params), strict=True):
            if search.error is not None:
                search.done, search.finished = True, []
                continue
            options.sort(key=lambda beam: -beam.logprob)
            _advance(search, options[:candidates], beam_width, eos, step == max_tokens, length_penalty)
    return [
        BeamSearchOutput(
            prompt.text,
            prompt.ids,
            [_sequence(engine, prompt.ids, score, beam, eos) for score, beam in search.finished],
            search.error,
        )
        for prompt, search in zip(prompts, searches, strict=True)
    ]


def _continued(engine: Engine, prompt: Encoded, beam: Beam, params: SamplingParams) -> RequestGroup:
    ids = prompt.ids + beam.token_ids
    return engine.new_group(ids, params, cache_salt=prompt.cache_salt, adapter=prompt.adapter)


def _next_tokens(thread: EngineThread, searches: Sequence[Search], params: SamplingParams) -> list[list[Beam]]:
    """Every beam of every search with each of its likeliest next tokens. What fails is noted in its search."""
    asked = [
        [(beam, _continued(thread.engine, search.prompt, beam, params)) for beam in search.beams] for search in searches
    ]
    thread.complete([group for beams in asked for _, group in beams])
    for search, beams in zip(searches, asked, strict=True):
        search.error = next((error for _, group in beams if (error := group.members[0].error) is not None), None)
    return [
        [
            Beam([*beam.token_ids, token], beam.logprob + logprob.logprob)
            for beam, group in beams
            for token, logprob in (group.members[0].completion().logprobs or [{}])[0].items()
        ]
        for beams in asked
    ]


def _advance(
    search: Search, options: list[Beam], width: int, eos: frozenset[int], last: bool, length_penalty: float
) -> None:
    """One round: `options` are the best candidates, best first."""
    ends = [last or beam.token_ids[-1] in eos for beam in options]
    length = len(options[0].token_ids)
    # Only the best `width` candidates may finish; the others are there to go on in their place.
    for beam, end in list(zip(options, ends, strict=True))[:width]:
        if end:
            search.finished.append((beam.logprob / length**length_penalty, beam))
    search.finished.sort(key=lambda item: -item[0])
    del search.finished[width:]
    search.beams = [beam for beam, end in zip(options, ends, strict=True) if not end][:width]
    if not search.beams:
        search.done = True
    elif len(search.finished) == width:
        # Not exact where longer is better, but what transformers does: the best beam is scored at its length now.
        search.done = search.beams[0].logprob / length**length_penalty <= search.finished[-1][0]


def _sequence(engine: Engine, prompt: list[int], score: float, beam: Beam, eos: frozenset[int]) -> BeamSearchSequence:
    ended = beam.token_ids[-1] in eos
    detokenizer = Detokenizer(engine.tokenizer, prompt_ids=prompt)
    text = detokenizer.push(beam.token_ids) + detokenizer.finish()
    return BeamSearchSequence(beam.token_ids, text, beam.logprob, score, "stop" if ended else "length")
