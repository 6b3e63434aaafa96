"""`LLM`: a loaded model and what can be asked of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, NoReturn, Self, Unpack

from jaxinfer.aliases import Words, takes
from jaxinfer.aliases.sampling import CALL, SAMPLING
from jaxinfer.checkpoint.factors import AdapterInfo
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.deployment import read_deployment
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.feed import OnError
from jaxinfer.engine.load import Loaded, load_opened
from jaxinfer.engine.loading import open_model
from jaxinfer.engine.outputs import RequestOutput, ScoreOutput
from jaxinfer.engine.pooling.engine import PoolingEngine
from jaxinfer.engine.pooling.load import LoadedPooling, load_pooling
from jaxinfer.engine.prompts import Prompt, is_single_conversation, prompt_list
from jaxinfer.engine.sizing import Sizes
from jaxinfer.engine.stats import EngineStats
from jaxinfer.engine.thread import EngineThread
from jaxinfer.errors import RequestError
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.tasks import GENERATE
from jaxinfer.pooling import NO_PARAMS, PoolingMethods, given
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.tasks.beam_search import BeamSearchOutput, beam_search
from jaxinfer.tasks.generate import GenerateTask, adapted, prompts_as_they_come, prompts_asked
from jaxinfer.tasks.params import PoolingParams
from jaxinfer.tasks.score import Scorable, ScoreTask, Text, TextAsked, texts_asked
from jaxinfer.tasks.task import for_each
from jaxinfer.text.base import Tokenizer

Message = Mapping[str, Any]
# Arguments of calls that are other programs', or belong to SamplingParams.
ARGUMENTS = CALL.meaning((*SamplingParams.__dataclass_fields__, *SAMPLING), "it belongs in SamplingParams")
# Of `score`: vLLM's names.
SCORED = Words(
    "argument",
    is_request=True,
    same={"queries": "texts", "documents": "continuations", "data_1": "texts", "data_2": "continuations"}
    | {"text_1": "texts", "text_2": "continuations", "lora_request": "adapter"},
)
Adapters = Any  # the name of one, or vLLM's LoRARequest; None: the model itself


class LLM(PoolingMethods):
    """A model in memory: a folder in Hugging Face's format, or a hub id. Options: see EngineConfig.

    Raises ValueError, FileNotFoundError and other OSErrors, each with one line: what is wrong, where, what to do.
    Usable as a context manager; `close()` frees the memory. Any number of threads may use it at once: what they ask for
    runs in one batch.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Unpack[EngineConfig]):
        opened = open_model(model, **options)
        self.task = opened.task
        self._thread: EngineThread | None = None
        self._pooling: PoolingEngine | None = None
        loaded: Loaded | LoadedPooling
        if self.task == GENERATE:
            loaded = load_opened(opened)
            self._sizes = loaded.sizes
            self.model: AbstractModel = loaded.engine.runner.model
            self.tokenizer = loaded.engine.tokenizer
            self._default_sampling_params = loaded.default_sampling_params
            self._thread = EngineThread(loaded.engine, "LLM")
        else:
            loaded = load_pooling(opened)
            self.model, self.tokenizer, self._pooling = loaded.engine.model, loaded.tokenizer, loaded.engine
            self.take(loaded)
        self.folder = loaded.folder
        self.dtype = loaded.dtype
        self.load_seconds = loaded.load_seconds
        self.description = loaded.describe()

    @classmethod
    def from_config(
        cls,
        path: str | os.PathLike[str],
        *,
        model: str | os.PathLike[str] | None = None,
        **options: Unpack[EngineConfig],
    ) -> Self:
        """A deployment, as a YAML file says it (see configs/ and engine/deployment.py); `model` and `options` come
        before what it says. Raises what LLM() raises, and ValueError naming the line of the file that is wrong."""
        model, options = read_deployment(path).loading(model, options)
        return cls(model, **options)

    @property
    def engine_thread(self) -> EngineThread:
        """Where requests are submitted. Raises UnsupportedError where the model makes no text."""
        if self._thread is None:
            raise self._unsupported()
        return self._thread

    @property
    def sizes(self) -> Sizes:
        """How much context there is room for. Raises UnsupportedError where the model makes no text."""
        if self._thread is None:
            raise self._unsupported()
        return self._sizes

    @cached_property
    def _generate(self) -> GenerateTask:
        return GenerateTask(self.engine_thread)

    @cached_property
    def _score(self) -> ScoreTask:
        return ScoreTask(self.engine_thread)

    @property
    def engine(self) -> Engine:
        """What runs the requests, in a thread of its own. Raises ValueError after `close`."""
        self.engine_thread.check_open()
        return self.engine_thread.engine

    @property
    def stats(self) -> EngineStats:
        """Requests, pages, tokens and seconds, as they are now and since loading."""
        return self.engine.stats if self._pooling is None else dataclasses.replace(self._pooling.stats)

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling (or fetching compiled programs from the cache) since loading."""
        return (self.engine.runner if self._pooling is None else self._pooling).compile_seconds

    def __repr__(self) -> str:
        closed = self.engine_thread.closed if self._pooling is None else self._pooling.closed
        return f"<LLM {self.folder}: {'closed' if closed else self.description}>"

    def __getstate__(self) -> NoReturn:
        raise TypeError("an LLM can't be pickled or copied, as its weights are on a device: load it where it is to run")

    def get_tokenizer(self) -> Tokenizer:
        """`tokenizer`, as vLLM has it."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json asks for; greedy unless it says `do_sample`."""
        if self._thread is None:
            raise self._unsupported()
        return self._default_sampling_params()

    @takes(ARGUMENTS)
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        adapter: Adapters | Sequence[Adapters] = None,
        use_tqdm: bool = True,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Continues each prompt; outputs come in input order.

        A prompt is text, a list of token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`. One SamplingParams for
        all, or one each; None takes `get_default_sampling_params()`. priority: one number each, lower runs earlier.
        adapter: the name of one for all, or one each, None for the model itself; a prompt as a dict may have its own.
        use_tqdm: a progress bar on stderr. A prompt that can't be served raises ValueError before anything runs, or
        with on_error="return" has its own output say why (`error`).
        """
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        asked = prompts_asked(prompts, params, priority, adapter)
        asked.sort(key=lambda entry: entry.priority)  # not all of them are given to the engine at once
        return self._generate.run_all(asked, on_error, use_tqdm)

    def generate_iter(
        self,
        prompts: Iterable[Prompt | tuple[Prompt, SamplingParams]],
        sampling_params: SamplingParams | None = None,
        *,
        in_order: bool = False,
        adapter: Adapters = None,
        on_error: OnError = "raise",
    ) -> Iterator[RequestOutput]:
        """Continues prompts as they come out of an iterable, and yields each output when it is done.

        Reads ahead no further than it needs to keep the device busy, so the memory does not depend on how many there
        are. `output.index` is the prompt's place in the input; in_order=True yields in that order. A pair of prompt and
        SamplingParams has parameters of its own. adapter: of prompts that have none of their own. on_error: as for
        `generate`, when the prompt is read; what was read before is done first. An iterable that is no list is read in
        a thread of its own, so that one that is slow, or waits for an answer, keeps nobody waiting.
        """
        if isinstance(prompts, str | Mapping):
            raise RequestError("prompts is one prompt: generate_iter takes an iterable of them", "prompts")
        default = sampling_params or self.get_default_sampling_params()

        asked = prompts_as_they_come(prompts, default, adapter)
        if isinstance(prompts, Sequence) and on_error == "raise":  # all are there: nothing runs before all are right
            return self._generate.run(self._generate.checked_all(list(asked)), on_error, in_order)
        return self._generate.run(asked, on_error, in_order)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, adapter: Adapters = None
    ) -> Iterator[str]:
        """The text of one prompt in pieces, as it comes: whole characters, in all exactly `generate`'s text. Raises
        ValueError where that has an `error`."""
        outputs = self.stream_output(prompt, sampling_params, adapter=adapter)

        def pieces() -> Iterator[str]:
            for piece, output in outputs:
                if piece:
                    yield piece
                if output.error is not None:
                    raise ValueError(output.error)

        return pieces()

    def stream_output(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, adapter: Adapters = None
    ) -> Iterator[tuple[str, RequestOutput]]:
        """Pairs of new text and the output so far; the last one is finished."""
        return self._generate.stream(prompt, sampling_params or self.get_default_sampling_params(), adapter)

    def chat_prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, **template_kwargs: Any
    ) -> dict[str, list[int]]:
        """A conversation as a prompt, by the checkpoint's chat template; it gets `tools` and all further arguments."""
        if self._thread is None:
            raise self._unsupported()
        return {"prompt_token_ids": self.tokenizer.apply_chat_template(messages, tools, **template_kwargs)}

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        adapter: Adapters | Sequence[Adapters] = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, a list of `{"role": ..., "content": ...}`, or each of several; adapter: as for
        `generate`.

        The template gets `tools`, what is in chat_template_kwargs, and all further arguments; of these
        `chat_template`, another one or the name of one of the checkpoint's, and `add_generation_prompt` are not for it.
        """
        given = template_kwargs if adapter is None else {**template_kwargs, "adapter": adapter}
        given = ARGUMENTS.translated(given, None)
        adapter = given.pop("adapter", None)  # also as lora_request
        template_kwargs = {**(chat_template_kwargs or {}), **given}
        conversations: Any = [messages] if is_single_conversation(messages) else messages
        prompts = [self.chat_prompt(c, tools, **template_kwargs) for c in conversations]
        return self.generate(prompts, sampling_params, adapter=adapter, use_tqdm=use_tqdm)

    @takes(SCORED)
    def score(
        self,
        texts: Prompt | Sequence[Prompt],
        continuations: Text | Sequence[Text] | None = None,
        *,
        truncate: bool = False,
        truncate_prompt_tokens: int | None = None,
        pooling_params: PoolingParams | None = None,
        chat_template: str | None = None,
        adapter: Adapters | Sequence[Adapters] = None,
        use_tqdm: bool = True,
        on_error: OnError = "raise",
    ) -> list[Any]:
        """Of a language model ScoreOutputs: how likely each text is, or with continuations, how likely each of them is
        after its prompt (or all of them after one prompt). Of others ScoringRequestOutputs, of `score(queries,
        documents)`: how well each document answers its query (or all of them one query). Outputs come in input order.

        A text or prompt is text, token ids, or a dict of one of them, as for `generate`, with an adapter of its own; a
        continuation is text or token ids. What several prompts begin with is computed once. A text's first token is
        given, not scored, unless the tokenizer puts a BOS before it. Spaces at a prompt's end count as the
        continuation's, as in lm-eval. adapter, use_tqdm, on_error: as for `generate`.

        A query and a document go together through a model with one class, whose score comes after the checkpoint's
        activation; by models that embed each has a vector, and the score is their similarity, cosine where the
        checkpoint says nothing else. chat_template: how rerankers that are language models get the two, a template with
        the roles query and document, or one of "qwen3_reranker" and "bge_reranker_gemma". The rest: see PoolingMethods.
        """
        params = given(pooling_params, truncate_prompt_tokens)
        if self.task != GENERATE:
            if adapter is not None:
                raise RequestError(f"adapter is {adapter!r:.80}: adapters are of models that make text", "adapter")
            return self._scored(texts, continuations, truncate, params, chat_template, use_tqdm, on_error)
        if truncate or params != NO_PARAMS or chat_template is not None:
            raise RequestError(
                "truncate, pooling_params and chat_template are for models that score a query and a document; "
                f"{self._unsupported()}"
            )
        return self._score.run_all(texts_asked(texts, continuations, adapter), on_error, use_tqdm)

    def score_iter(
        self,
        scorables: Iterable[Scorable],
        *,
        in_order: bool = False,
        adapter: Adapters = None,
        on_error: OnError = "raise",
    ) -> Iterator[ScoreOutput]:
        """`score` of texts, and of (prompt, continuation) pairs, as they come out of an iterable, like
        `generate_iter`."""
        if isinstance(scorables, str | tuple):
            raise RequestError("scorables is one text or pair: score_iter takes an iterable of them", "scorables")
        asked = (TextAsked(i, scorable, adapter) for i, scorable in enumerate(scorables))
        return self._score.run(asked, on_error, in_order)

    def loglikelihood_rolling(
        self, texts: Text | Sequence[Text], *, adapter: Adapters | Sequence[Adapters] = None, use_tqdm: bool = True
    ) -> list[ScoreOutput]:
        """How likely each text is, however long: its first token is scored after BOS (or EOS), and what is longer than
        max_model_len is cut in windows, as lm-eval does. Raises ValueError for an empty text."""
        return self._score.rolling(texts, use_tqdm, adapter)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        beam_width: int,
        max_tokens: int,
        length_penalty: float = 1.0,
        ignore_eos: bool = False,
        adapter: Adapters | Sequence[Adapters] = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt, best first: see `jaxinfer.tasks.beam_search`. adapter: as
        for `generate`."""
        listed = prompt_list(prompts)
        encoded = [
            adapted(prompt, self.tokenizer, own)
            for prompt, own in zip(listed, for_each("adapter", adapter, listed), strict=True)
        ]
        return beam_search(self.engine_thread, encoded, beam_width, max_tokens, length_penalty, ignore_eos)

    def load_adapter(self, name: str, adapter: str | os.PathLike[str]) -> None:
        """Loads a low-rank adapter in PEFT's format, a folder or hub id, in place of another of this name; requests
        that have that one go on with it. Raises ValueError and FileNotFoundError."""
        self.engine.load_adapter(name, resolve(adapter))

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; requests that have it go on. Raises RequestError where there is none of this name."""
        self.engine.unload_adapter(name)

    def list_adapters(self) -> dict[str, AdapterInfo]:
        """Those that are loaded, by name."""
        return self.engine.list_adapters()

    def close(self) -> None:
        """Frees weights and cache. What was returned stays; what runs in other threads ends with an error, and nothing
        can be asked any more."""
        if self._pooling is not None:
            self._pooling.close()
        else:
            self.engine_thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
