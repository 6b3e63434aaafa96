"""What a user asks of sampling. Names, defaults and meanings are vLLM's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from jaxinfer.aliases import takes
from jaxinfer.aliases.sampling import SAMPLING
from jaxinfer.errors import RequestError
from jaxinfer.sampling.ids import are_ids, is_id
from jaxinfer.sampling.structured import StructuredOutputsParams

DEFAULT_MAX_TOKENS = 256  # of jaxinfer.generate and the command line: people want an answer, not vLLM's 16 tokens
MAX_LOGPROBS = 20
MAX_STOP_LENGTH = 4096  # characters: text that may begin one is compared with it again and again
MAX_STOP_IDS = 8  # a row's stop ids, and its biased tokens, are bounded arrays on the device
MAX_LOGIT_BIAS = 512
MAX_BIAS = 1e30  # of one token, either way; the sum of it and a logit must be finite
FILTERS = frozenset({"top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"})  # of what is drawn
GREEDY_BELOW = 1e-5  # temperatures below it are greedy, as in vLLM
MOST_COPIES = 2**15  # of one token in an output are counted for penalties: counts are 16 bits on the device


class ReadOnly(dict[Any, Any]):
    """A dict that can't be changed, so that one's parameters stay what was checked."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("sampling parameters can't be changed: make others, by with_changes")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> Any:
        return type(self), (dict(self),)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled.

    n: continuations of the prompt; with a seed, the i-th one has seed + i.
    temperature: 0 is greedy.
    top_k: 0 or -1 keeps all tokens.
    top_p: in (0, 1].
    min_p: in [0, 1]. Filters apply in the order temperature, min_p, top_k, top_p; tokens that tie with the last one
        kept are kept too.
    seed: the same seed and prompt give the same tokens, whatever else is in the batch. None draws from the LLM's seed.
    presence_penalty, frequency_penalty: in [-2, 2], subtracted from the logit of a token that is in the output, once or
        as often as it is (32,768 times at most).
    repetition_penalty: in (0, 2], divides the logit of a token that is in prompt or output if positive, else multiplies
        it.
    logit_bias: token id -> what is added to its logit.
    allowed_token_ids: no other is sampled.
    bad_words: words that are never completed, as the tokenizer spells them, with and without a space before. What is
        excluded by one parameter stays so, whatever others say. Where they leave no token, the request is refused, or
        ends with finish_reason "error" where that shows only on the way.
    stop: strings that end the text, and are cut off.
    include_stop_str_in_output: they are not.
    stop_token_ids: ids that end it besides the checkpoint's own EOS ids. The id stays in `token_ids`, not in the text.
    max_tokens: None is as many as the context has room for.
    min_tokens: no stop before these.
    ignore_eos: the checkpoint's EOS ids don't end the text.
    logprobs: None, or how many of the likeliest tokens to report beside the sampled one, at most 20. They are those of
        the model, before penalties, temperature and filters.
    prompt_logprobs: the same for the prompt.
    structured_outputs: what the text must look like, StructuredOutputsParams or a dict of its fields. See
        docs/structured_output.md for how it meets the other parameters.
    skip_special_tokens: leave special tokens out of the text.
    detokenize: False: no text at all.

    The rest has transformers' names and meanings:

    suppress_tokens: ids that are never sampled.
    begin_suppress_tokens: not as the first one.
    bad_words_ids: sequences of ids that are never completed, also not where they begin in the prompt.
    no_repeat_ngram_size: no so many tokens in a row come twice, the prompt's among them.
    min_length: no stop id before there are so many tokens, the prompt's among them.
    forced_bos_token_id: the token after a prompt of one token.
    forced_eos_token_id: the last one that fits.
    exponential_decay_length_penalty: (start, factor): from the start-th new token on, stop ids gain |logit| *
        (factor**n - 1), n tokens later.
    typical_p, epsilon_cutoff, eta_cutoff: in (0, 1] and twice in [0, 1), filters after top_p, in this
        order.

    What vLLM, transformers and mlx-lm call otherwise (max_new_tokens, do_sample, temp) is taken under that name, too.
    Raises ValueError naming the parameter, its value and what it may be; for those that are not here, what to do.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0

    def __post_init__(self) -> None:
        self._integer("n", 1, 1024)
        self._number("temperature", 0, 1e6)
        self._number("top_p", 0, 1, above=True)
        self._number("min_p", 0, 1)
        self._number("presence_penalty", -2, 2)
        self._number("frequency_penalty", -2, 2)
        self._number("repetition_penalty", 0, 2, above=True)
        self._integer("top_k", -1, 2**31 - 1)
        self._integer("seed", -(2**63), 2**63 - 1, optional=True)
        self._integer("max_tokens", 1, 2**31 - 1, optional=True)
        self._integer("min_tokens", 0, 2**31 - 1)
        self._integer("logprobs", 0, MAX_LOGPROBS, optional=True)
        self._integer("prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        self._integer("no_repeat_ngram_size", 0, 2**31 - 1)
        self._integer("min_length", 0, 2**31 - 1)
        self._integer("forced_bos_token_id", 0, 2**31 - 1, optional=True)
        self._integer("forced_eos_token_id", 0, 2**31 - 1, optional=True)
        self._number("typical_p", 0, 1, above=True)
        self._number("epsilon_cutoff", 0, 1, below=True)
        self._number("eta_cutoff", 0, 1, below=True)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise self._error(name, "it must be True or False")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise self._error("min_tokens", f"it must be at most max_tokens, {self.max_tokens}")
        # One form inside, whatever was given: tuples.
        for name in ("stop", "bad_words"):
            object.__setattr__(self, name, self._strings(name))
        if any(len(stop) > MAX_STOP_LENGTH for stop in self.stop_strings):
            raise self._error("stop", f"a stop string may have {MAX_STOP_LENGTH:,} characters")
        for name in ("stop_token_ids", "allowed_token_ids", "suppress_tokens", "begin_suppress_tokens"):
            object.__setattr__(self, name, self._ids(name))
        if len(self.stop_token_ids or ()) > MAX_STOP_IDS:
            raise self._error("stop_token_ids", f"at most {MAX_STOP_IDS} are supported; use stop strings for more")
        if self.stop and not self.detokenize:
            raise self._error("stop", "stop strings are found in the text: they need detokenize=True")
        self._check_bias()
        self._check_bad_words_ids()
        self._check_decay()
        self._check_structured_outputs()

    def with_changes(self, /, **changes: Any) -> SamplingParams:
        """These parameters with others in place of some. Who asks for a filter of a greedy default asks for sampling:
        top_p without a temperature would do nothing. Who asks for less than min_tokens gets that."""
        if changes.get("do_sample") and not self.greedy and not changes.keys() & {"temperature", "temp"}:
            changes["temperature"] = self.temperature  # it is sampled already
        changes = SAMPLING.translated(changes, [field.name for field in dataclasses.fields(self)])
        if self.greedy and changes.keys() & FILTERS:
            changes = {"temperature": 1.0} | changes
        most = changes.get("max_tokens")
        if isinstance(most, int) and "min_tokens" not in changes and 1 <= most < self.min_tokens:
            changes = {"min_tokens": most} | changes
        return dataclasses.replace(self, **changes)

    def named_ids(self) -> Iterator[tuple[str, Iterable[int]]]:
        """The parameters that name tokens, and which."""
        for name in ("stop_token_ids", "allowed_token_ids", "suppress_tokens", "begin_suppress_tokens", "logit_bias"):
            yield name, getattr(self, name) or ()
        yield from (("bad_words_ids", ids) for ids in self.bad_words_ids or ())
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            yield name, () if getattr(self, name) is None else (getattr(self, name),)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW

    @cached_property  # asked for each row at each step
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @cached_property  # asked for each row at each step
    def has_masks(self) -> bool:
        """Whether some tokens are excluded or biased."""
        never = self.allowed_token_ids or self.bad_words or self.suppress_tokens or self.bad_words_ids
        return bool(self.logit_bias or never or self.begin_suppress_tokens or self.no_repeat_ngram_size)

    @cached_property  # asked for each row at each step
    def is_plain(self) -> bool:
        """Whether temperature, top_k, top_p and min_p are all that is asked for: see `Sampler.full`."""
        later = self.min_tokens or self.min_length or self.exponential_decay_length_penalty
        forced = self.forced_bos_token_id is not None or self.forced_eos_token_id is not None
        cut_off = self.typical_p < 1 or self.epsilon_cutoff > 0 or self.eta_cutoff > 0
        guided = self.structured_outputs is not None
        asked = self.has_penalties or self.has_masks or self.logprobs is not None
        return not (asked or later or forced or cut_off or guided)

    def least(self, prompt_length: int) -> int:
        """How many tokens come before anything may end the output."""
        return max(self.min_tokens, self.min_length - prompt_length)

    def _error(self, name: str, problem: str) -> RequestError:
        return RequestError(f"sampling parameter {name} is {getattr(self, name)!r:.100}: {problem}", name)

    def _number(self, name: str, low: float, high: float, above: bool = False, below: bool = False) -> None:
        value = getattr(self, name)
        fine = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not fine or (above and value == low) or (below and value == high):
            least = f"{'above' if above else 'of at least'} {low:g}"
            raise self._error(name, f"it must be a number {least} and {'below' if below else 'at most'} {high:g}")

    def _integer(self, name: str, low: int, high: int, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            none = " or None" if optional else ""
            raise self._error(name, f"it must be an integer from {low} to {high}{none}")

    def _strings(self, name: str) -> tuple[str, ...]:
        value = getattr(self, name)
        strings = _listed(value)
        if not all(isinstance(s, str) and s for s in strings):
            raise self._error(name, "it must be a non-empty string or a list of them")
        return tuple(strings)

    def check_texts(self) -> None:
        """Raises ValueError for strings that no text can have in it: a tokenizer can't spell them."""
        for name in ("stop", "bad_words"):
            if any("\ud800" <= character <= "\udfff" for string in self._strings(name) for character in string):
                raise self._error(name, "it has half a surrogate pair, which no text has")

    def _ids(self, name: str) -> tuple[int, ...] | None:
        value = getattr(self, name)
        if value is None:
            return None
        ids = [value] if is_id(value) else value
        if not _are_ids(ids):
            raise self._error(name, "it must be a list of token ids")
        if name == "allowed_token_ids" and len(ids) == 0:
            raise self._error(name, "it must allow at least one token id, or be None")
        return tuple(map(int, ids))

    def _check_bias(self) -> None:
        bias = self.logit_bias
        if bias is None:
            return
        if not isinstance(bias, Mapping) or not _are_ids(list(bias)):
            raise self._error("logit_bias", "it must map token ids to numbers")
        for value in bias.values():
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_BIAS:
                raise self._error(
                    "logit_bias",
                    f"every bias must be a number of at most {MAX_BIAS:g} either way",
                )
        if len(bias) > MAX_LOGIT_BIAS:
            raise self._error("logit_bias", f"at most {MAX_LOGIT_BIAS} tokens may be biased")
        object.__setattr__(self, "logit_bias", ReadOnly({int(i): value for i, value in bias.items()}))

    def _check_bad_words_ids(self) -> None:
        words = self.bad_words_ids
        if words is None:
            return
        listed = isinstance(words, Iterable) and not isinstance(words, str | bytes | Mapping)
        every = list(words) if listed else []
        if not listed or not all(_are_ids(word) and len(word) for word in every):
            raise self._error("bad_words_ids", "it must be a list of lists of token ids, none of them empty")
        object.__setattr__(self, "bad_words_ids", tuple(tuple(map(int, word)) for word in every))

    def _check_decay(self) -> None:
        decay = self.exponential_decay_length_penalty
        if decay is None:
            return
        pair = tuple(decay) if isinstance(decay, Sequence) and not isinstance(decay, str) else ()
        fine = len(pair) == 2 and is_id(pair[0]) and 0 <= pair[0] < 2**31
        if not fine or isinstance(pair[1], bool) or not isinstance(pair[1], int | float) or not 0 < pair[1] <= MAX_BIAS:
            raise self._error(
                "exponential_decay_length_penalty", "it must be a number of tokens and a factor above 0, as (12, 1.05)"
            )
        object.__setattr__(self, "exponential_decay_length_penalty", (int(pair[0]), float(pair[1])))

    def _check_structured_outputs(self) -> None:
        if self.structured_outputs is None:
            return
        object.__setattr__(self, "structured_outputs", StructuredOutputsParams.of(self.structured_outputs))
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            if getattr(self, name) is not None:
                raise self._error(name, "a forced token need not be one of structured_outputs: leave one of them out")


# Other programs' names too: of a dataclass, __init__ is what takes them.
SamplingParams.__init__ = takes(SAMPLING)(SamplingParams.__init__)  # type: ignore[method-assign]


def _listed(value: Any) -> list[Any]:
    """Nothing, one item or several, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else [value]


def _are_ids(value: Any) -> bool:
    """Whether they are ids that a vocabulary may have."""
    return are_ids(value) and all(0 <= i < 2**31 for i in value)
