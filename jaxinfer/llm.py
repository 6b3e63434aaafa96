"""`LLM`: a loaded model and what can be asked of it."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack, cast

from jaxinfer.aliases import takes
from jaxinfer.aliases.sampling import CALL, SAMPLING
from jaxinfer.engine.asked import Asked, Pair, Scorable, ScoreAsked, Text, checked, failed, refused
from jaxinfer.engine.beam_search import BeamSearchOutput, beam_search
from jaxinfer.engine.deployment import read_deployment
from jaxinfer.engine.engine import Engine, EngineStats
from jaxinfer.engine.feed import Feed, OnError
from jaxinfer.engine.generation import Group
from jaxinfer.engine.load import load_engine
from jaxinfer.engine.options import LoadOptions
from jaxinfer.engine.outputs import RequestOutput, ScoreOutput
from jaxinfer.engine.prompts import Encoded, Prompt, encode_prompt, is_single_conversation, prompt_list
from jaxinfer.engine.scoring import (
    Scoring,
    encode_pair,
    encode_text,
    join_windows,
    prefix_token_id,
    rolling_windows,
    text_ids,
)
from jaxinfer.engine.thread import AnyGroup, EngineThread, Submission
from jaxinfer.sampling.ids import are_ids
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.text.base import Tokenizer

Message = Mapping[str, Any]


# Arguments of calls that are other programs', or belong to SamplingParams.
ARGUMENTS = CALL.meaning((*SamplingParams.__dataclass_fields__, *SAMPLING), "it belongs in SamplingParams")


class LLM:
    """A model in memory: a folder in Hugging Face's format, or a hub id. Options: see LoadOptions.

    Raises ValueError, FileNotFoundError and other OSErrors, each with one line: what is wrong, where, what to do.
    Usable as a context manager; `close()` frees the memory. Any number of threads may use it at once: what they ask for
    runs in one batch.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Unpack[LoadOptions]):
        loaded = load_engine(model, **options)
        self.folder = loaded.folder
        self.dtype = loaded.dtype
        self.sizes = loaded.sizes
        self.load_seconds = loaded.load_seconds
        self.description = loaded.describe()
        self.model = loaded.engine.runner.model
        self.tokenizer = loaded.engine.tokenizer
        self._default_sampling_params = loaded.default_sampling_params
        self.engine_thread = EngineThread(loaded.engine, "LLM")

    @classmethod
    def from_config(
        cls,
        path: str | os.PathLike[str],
        *,
        model: str | os.PathLike[str] | None = None,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """A deployment, as a YAML file says it (see configs/ and engine/deployment.py); `model` and `options` come
        before what it says. Raises what LLM() raises, and ValueError naming the line of the file that is wrong."""
        named, given = read_deployment(path).loading(model, options)
        return cls(named, **given)

    @property
    def engine(self) -> Engine:
        """What runs the requests, in a thread of its own. Raises ValueError after `close`."""
        self.engine_thread.check_open()
        return self.engine_thread.engine

    @property
    def stats(self) -> EngineStats:
        """Requests, pages, tokens and seconds, as they are now and since loading."""
        return self.engine.stats

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling (or fetching compiled programs from the cache) since loading."""
        return self.engine.runner.compile_seconds

    def __repr__(self) -> str:
        return f"<LLM {self.folder}: {'closed' if self.engine_thread.closed else self.description}>"

    def get_tokenizer(self) -> Tokenizer:
        """`tokenizer`, as vLLM has it."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json asks for; greedy unless it says `do_sample`."""
        return self._default_sampling_params()

    @takes(ARGUMENTS)
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        use_tqdm: bool = True,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Continues each prompt; outputs come in input order.

        A prompt is text, a list of token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`. One SamplingParams for
        all, or one each; None takes `get_default_sampling_params()`. priority: one number each, lower runs earlier.
        use_tqdm: a progress bar on stderr. A prompt that can't be served raises ValueError before anything runs, or
        with on_error="return" has its own output say why (`error`).
        """
        asked = self._asked(prompts, sampling_params, priority)
        if on_error == "raise":
            asked = self._encoded(asked)
        asked.sort(key=lambda one: one.priority)  # not all of them are given to the engine at once
        outputs = self._run(asked, on_error)
        return sorted(_progress(outputs, len(asked), use_tqdm, "Generated"), key=lambda output: output.index)

    def generate_iter(
        self,
        prompts: Iterable[Prompt | tuple[Prompt, SamplingParams]],
        sampling_params: SamplingParams | None = None,
        *,
        in_order: bool = False,
        on_error: OnError = "raise",
    ) -> Iterator[RequestOutput]:
        """Continues prompts as they come out of an iterable, and yields each output when it is done.

        Reads ahead no further than it needs to keep the device busy, so the memory does not depend on how many there
        are. `output.index` is the prompt's place in the input; in_order=True yields in that order. A pair of prompt and
        SamplingParams has parameters of its own. on_error: as for `generate`, when the prompt is read; what was read
        before is done first. An iterable that is no list is read in a thread of its own, so that one that is slow, or
        waits for an answer, keeps nobody waiting.
        """
        if isinstance(prompts, str | Mapping):
            raise ValueError("prompts is one prompt: generate_iter takes an iterable of them")
        default = sampling_params or self.get_default_sampling_params()

        def asked() -> Iterator[Asked]:
            for i, prompt in enumerate(prompts):
                own = isinstance(prompt, tuple) and len(prompt) == 2 and isinstance(prompt[1], SamplingParams)
                yield Asked(i, *prompt) if own else Asked(i, prompt, default)  # type: ignore[arg-type]

        if isinstance(prompts, Sequence) and on_error == "raise":  # all are there: nothing runs before all are right
            return self._run(self._encoded(list(asked())), on_error, in_order)
        return self._run(asked(), on_error, in_order)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one prompt in pieces, as it comes: whole characters, in all exactly `generate`'s text. Raises
        ValueError where that has an `error`."""
        outputs = self.stream_output(prompt, sampling_params)

        def pieces() -> Iterator[str]:
            for piece, output in outputs:
                if piece:
                    yield piece
                if output.error is not None:
                    raise ValueError(output.error)

        return pieces()

    def stream_output(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[tuple[str, RequestOutput]]:
        """Pairs of new text and the output so far; the last one is finished."""
        params = sampling_params or self.get_default_sampling_params()
        group = self._new_group(Asked(0, prompt, params))
        if len(group.members) != 1:
            raise ValueError(f"sampling parameter n is {params.n}: a stream has one continuation; use generate")
        outputs: queue.SimpleQueue[RequestOutput | BaseException] = queue.SimpleQueue()

        def listener(group: Group, error: BaseException | None) -> None:
            outputs.put(error or group.output())

        def pieces() -> Iterator[tuple[str, RequestOutput]]:
            try:
                yield "", group.output()  # taken here, below: a generator that has not begun would not clean up
                finished, text = False, ""
                while not finished:
                    output = outputs.get()
                    if isinstance(output, BaseException):
                        raise output
                    finished, seen, text = output.finished, len(text), output.outputs[0].text
                    yield text[seen:], output
            finally:
                self.engine_thread.abort(group)

        stream = pieces()
        next(stream)
        self.engine_thread.submit([Submission(group, listener, streams=True)])
        return stream

    def chat_prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, **template_kwargs: Any
    ) -> dict[str, list[int]]:
        """A conversation as a prompt, by the checkpoint's chat template; it gets `tools` and all further arguments."""
        return {"prompt_token_ids": self.tokenizer.apply_chat_template(messages, tools, **template_kwargs)}

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, a list of `{"role": ..., "content": ...}`, or each of several.

        The template gets `tools`, what is in chat_template_kwargs, and all further arguments; of these
        `chat_template`, another one or the name of one of the checkpoint's, and `add_generation_prompt` are not for it.
        """
        template_kwargs = {**(chat_template_kwargs or {}), **ARGUMENTS.translated(template_kwargs, None)}
        conversations: Any = [messages] if is_single_conversation(messages) else messages
        prompts = [self.chat_prompt(c, tools, **template_kwargs) for c in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def score(
        self,
        texts: Text | Sequence[Text],
        continuations: Text | Sequence[Text] | None = None,
        *,
        use_tqdm: bool = True,
        on_error: OnError = "raise",
    ) -> list[ScoreOutput]:
        """How likely each text is, or with continuations, how likely each of them is after its prompt (or all of them
        after one prompt). Outputs come in input order.

        A text, prompt or continuation is text or a list of token ids. What several prompts begin with is computed
        once. A text's first token is given, not scored, unless the tokenizer puts a BOS before it. Spaces at a prompt's
        end count as the continuation's, as in lm-eval. use_tqdm, on_error: as for `generate`.
        """
        scorables: list[Scorable] = prompt_list(texts)  # type: ignore[assignment]
        if continuations is not None:
            following: list[Any] = prompt_list(continuations)
            if len(scorables) == 1:
                scorables *= len(following)
            if len(scorables) != len(following):
                raise ValueError(f"continuations: {len(following)} for {len(scorables)} prompts; give one each")
            scorables = list(zip(scorables, following, strict=True))  # type: ignore[arg-type]
        return self._score([ScoreAsked(i, one) for i, one in enumerate(scorables)], use_tqdm, on_error)

    def score_iter(
        self, scorables: Iterable[Scorable], *, in_order: bool = False, on_error: OnError = "raise"
    ) -> Iterator[ScoreOutput]:
        """`score` of texts, and of (prompt, continuation) pairs, as they come out of an iterable, like
        `generate_iter`."""
        if isinstance(scorables, str | tuple):
            raise ValueError("scorables is one text or pair: score_iter takes an iterable of them")
        return self._run((ScoreAsked(i, one) for i, one in enumerate(scorables)), on_error, in_order)

    def loglikelihood_rolling(self, texts: Text | Sequence[Text], *, use_tqdm: bool = True) -> list[ScoreOutput]:
        """How likely each text is, however long: its first token is scored after BOS (or EOS), and what is longer than
        max_model_len is cut in windows, as lm-eval does. Raises ValueError for an empty text."""
        asked: list[ScoreAsked] = []
        windows: list[range] = []
        listed: list[Any] = prompt_list(texts)
        first = prefix_token_id(self.tokenizer)
        for i, text in enumerate(listed):
            try:
                ids = text_ids(text, self.tokenizer, add_special_tokens=False)
            except ValueError as error:
                raise ValueError(f"text {i}: {error}") from None
            if not ids:
                raise ValueError(f"text {i} is empty: there is nothing to score")
            start = len(asked)
            pairs = rolling_windows(ids, first, self.sizes.max_model_len)
            asked += [ScoreAsked(start + n, pair) for n, pair in enumerate(pairs)]
            windows.append(range(start, len(asked)))
        parts = self._score(asked, use_tqdm, "raise")
        return [
            join_windows(i, text if isinstance(text, str) else None, parts[places.start : places.stop])
            for i, (text, places) in enumerate(zip(listed, windows, strict=True))
        ]

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        beam_width: int,
        max_tokens: int,
        length_penalty: float = 1.0,
        ignore_eos: bool = False,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt, best first: see `jaxinfer.engine.beam_search`."""
        encoded = [encode_prompt(prompt, self.tokenizer) for prompt in prompt_list(prompts)]
        return beam_search(self.engine_thread, encoded, beam_width, max_tokens, length_penalty, ignore_eos)

    def close(self) -> None:
        """Frees weights and cache. What was returned stays; what runs in other threads ends with an error, and nothing
        can be asked any more."""
        self.engine_thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _asked(self, prompts: Any, sampling_params: Any, priority: Sequence[int] | None) -> list[Asked]:
        listed = prompt_list(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = sampling_params if isinstance(sampling_params, list | tuple) else [sampling_params] * len(listed)
        for name, values in (("sampling_params", params), ("priority", priority)):
            if values is not None and len(values) != len(listed):
                raise ValueError(f"{name}: {len(values)} for {len(listed)} prompts; give one for all, or one each")
        priorities = [0] * len(listed) if priority is None else priority
        if not all(isinstance(p, int) for p in priorities):
            raise ValueError(f"priority is {list(priorities)}: it must be integers")
        return [Asked(i, *one) for i, one in enumerate(zip(listed, params, priorities, strict=True))]

    def _score(self, asked: list[ScoreAsked], use_tqdm: bool, on_error: OnError) -> list[ScoreOutput]:
        if on_error == "raise":
            asked = [one._replace(scorable=pair) for one, pair in checked(asked, self._check_pair)]
        outputs = self._run(asked, on_error)
        return sorted(_progress(outputs, len(asked), use_tqdm, "Scored"), key=lambda output: output.index)

    def _run(
        self, asked: Iterable[Asked] | Iterable[ScoreAsked], on_error: OnError, in_order: bool = False
    ) -> Iterator[Any]:
        """Outputs as they are done, or in order, with their places in the input."""
        if on_error not in ("raise", "return"):
            raise ValueError(f'on_error is {on_error!r}: it must be "raise" or "return"')
        self.engine_thread.check_open()
        on_failure = failed if on_error == "return" else refused

        def make(one: Asked | ScoreAsked) -> AnyGroup:
            return self._new_group(one) if isinstance(one, Asked) else self._new_scoring(one)

        return Feed(self.engine_thread, asked, make, on_failure, in_order).outputs()

    def _encode(self, asked: Asked) -> Encoded:
        """The prompt's ids."""
        if isinstance(asked.prompt, Encoded):
            return asked.prompt
        if not isinstance(asked.params, SamplingParams):
            raise ValueError(f"sampling_params is a {type(asked.params).__name__}: it must be SamplingParams")
        return encode_prompt(asked.prompt, self.tokenizer)

    def _encoded(self, asked: list[Asked]) -> list[Asked]:
        """With prompts that the engine takes, as ids."""
        return [one._replace(prompt=encoded) for one, encoded in checked(asked, self._check)]

    def _check(self, asked: Asked) -> Encoded:
        """The prompt, once it is sure that the engine takes it."""
        encoded = self._encode(asked)
        self.engine.check(encoded.ids, asked.params)
        return encoded

    def _encode_pair(self, asked: ScoreAsked) -> Pair:
        """The ids of what is to be scored."""
        scorable = asked.scorable
        if isinstance(scorable, Pair):
            return scorable
        if isinstance(scorable, tuple) and len(scorable) == 2 and not are_ids(scorable):
            prompt, scored = cast(tuple[Text, Text], scorable)
            ids = encode_pair(prompt, scored, self.tokenizer)
        else:
            scored = cast(Text, scorable)
            ids = encode_text(scored, self.tokenizer)
        return Pair(scored if isinstance(scored, str) else None, *ids)

    def _check_pair(self, asked: ScoreAsked) -> Pair:
        """What is to be scored, once it is sure that the engine takes it."""
        pair = self._encode_pair(asked)
        self.engine.check_scoring([*pair.given, *pair.scored], len(pair.given))
        return pair

    def _new_group(self, asked: Asked) -> Group:
        encoded = self._encode(asked)
        return self.engine.new_group(encoded.ids, asked.params, encoded.text, asked.priority, encoded.cache_salt)

    def _new_scoring(self, asked: ScoreAsked) -> Scoring:
        text, given, scored = self._encode_pair(asked)
        return self.engine.new_scoring([*given, *scored], len(given), text)


def _progress(outputs: Iterator[Any], total: int, shown: bool, done: str) -> Iterator[Any]:
    """A bar on stderr with the tokens a second that were `done`."""
    if not shown:
        yield from outputs
        return
    from tqdm import tqdm

    tokens = 0
    with tqdm(outputs, total=total, desc=done) as bar:
        for output in bar:
            parts = output.outputs if isinstance(output, RequestOutput) else [output]
            tokens += sum(len(part.token_ids) for part in parts)
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
            yield output
