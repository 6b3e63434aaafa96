"""`LLM`: a loaded model and what can be asked of it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import jax
import ml_dtypes
import numpy as np
import psutil

from jaxinfer.cache import cache_bytes_per_token
from jaxinfer.checkpoint.files import eos_token_ids, read_config, read_generation_config
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.load import FLOATS, load_params
from jaxinfer.compile_cache import enable_compile_cache
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.engine import Engine, EngineStats
from jaxinfer.engine.generation import Generation
from jaxinfer.engine.outputs import RequestOutput
from jaxinfer.engine.pages import PageAllocator
from jaxinfer.engine.runner import Runner
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sizing import CPU_SHARE, DEVICE_SHARE, RESERVE, size_cache
from jaxinfer.models.model import Model
from jaxinfer.models.registry import REGISTRY
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.text.tokenizer import check_vocabulary, load_tokenizer

log = logging.getLogger("jaxinfer")

Prompt = str | Sequence[int] | Mapping[str, Any]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Message = Mapping[str, Any]

MAX_STEPS = 32  # tokens a row that one decoding call may produce
STREAM_SECONDS = 0.1  # a stream shows something this often, where the device is fast enough


class LLM:
    """A model in memory.

    model: a folder in Hugging Face's format, or a hub id (with `revision` and `token`, as huggingface_hub has them).
    dtype: of weights, activations and cache. "auto" is what the checkpoint says on TPU and GPU (float16 on GPUs
        without bfloat16), float32 on CPU, where XLA multiplies 16-bit weights ten times slower.
    max_model_len: most tokens of prompt and output together. None: what config.json says, or what fits.
    seed: of requests that have no seed of their own.
    max_num_seqs: most sequences that run at once (256; 64 on CPU). max_num_batched_tokens: most tokens of one device
        call (2,048; 512 on CPU): longer prompts go in chunks. page_size: tokens a page of the cache.
    kv_cache_memory: bytes of the KV cache. None: what `max_num_seqs` sequences need, at most 90% of the free memory
        of an accelerator or 10% of a CPU machine's.
    on_progress: told, in a few words, what is being waited for.

    Raises ValueError, FileNotFoundError and other OSErrors, each with one line: what is wrong, where, what to do.
    Usable as a context manager; `close()` frees the memory.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: DType = "auto",
        max_model_len: int | None = None,
        seed: int = 0,
        revision: str | None = None,
        token: str | bool | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        page_size: int = 16,
        kv_cache_memory: int | None = None,
        on_progress: Callable[[str], None] | None = None,
    ):
        start = time.perf_counter()
        if dtype not in get_args(DType):
            raise ValueError(f"dtype is {dtype!r}: it must be one of {', '.join(get_args(DType))}")
        _check_integer("seed", seed, 0, 2**31 - 1)
        _check_integer("max_model_len", max_model_len, 2)
        _check_integer("max_num_seqs", max_num_seqs, 1, 4096)
        _check_integer("max_num_batched_tokens", max_num_batched_tokens, 1, 2**20)
        _check_integer("page_size", page_size, 1, 2**20)
        _check_integer("kv_cache_memory", kv_cache_memory, 1)
        say = on_progress or (lambda _: None)

        self.folder = resolve(model, revision, token)
        enable_compile_cache()
        device = jax.local_devices()[0]
        on_cpu = device.platform == "cpu"
        config = read_config(self.folder, REGISTRY)
        # The cheap files first: what is wrong with them shows before gigabytes are read.
        self._generation_config = read_generation_config(self.folder)
        self.model = Model.from_config(config, "float32")
        self.tokenizer = load_tokenizer(self.folder)
        check_vocabulary(self.tokenizer, self.model.config.vocab_size)
        eos = _eos_token_ids(self.folder, self._generation_config, config, self.tokenizer.eos_token_id)
        with Checkpoint(self.folder) as checkpoint:
            self.dtype = _dtype(dtype, config, checkpoint, device)
            self.model = Model.from_config(config, self.dtype)
            done = 0

            def on_tensor(nbytes: int) -> None:
                nonlocal done
                done += nbytes
                say(f"loading weights {done / max(checkpoint.nbytes, 1):.0%}")

            params = load_params(self.model, checkpoint, device, on_tensor)

        shape = self.model.config
        max_rows = max_num_seqs or (64 if on_cpu else 256)
        self.sizes = size_cache(
            bytes_per_token=cache_bytes_per_token(shape.num_layers, shape.num_kv_heads, shape.head_dim, self.dtype),
            page_size=page_size,
            max_num_seqs=max_rows,
            max_model_len=max_model_len,
            max_context=shape.max_context,
            available=_available(device) if kv_cache_memory is None else kv_cache_memory,
        )
        if max_model_len is None and self.sizes.max_model_len < shape.max_context:
            log.warning(
                "max_model_len is %d of the model's %d tokens: more does not fit in the KV cache",
                self.sizes.max_model_len,
                shape.max_context,
            )
        max_tokens = max_num_batched_tokens or max(512 if on_cpu else 2048, max_rows)
        pages = PageAllocator(self.sizes.num_pages, page_size)
        scheduler = Scheduler(pages, max_rows, max_tokens)
        runner = Runner(
            self.model,
            params,
            buckets=Buckets.make(max_rows, max_tokens),
            num_pages=self.sizes.num_pages,
            page_size=page_size,
            max_model_len=self.sizes.max_model_len,
            max_steps=MAX_STEPS,
            device=device,
            on_compile=say,
        )
        self._engine = Engine(
            runner,
            scheduler,
            self.tokenizer,
            eos_token_ids=eos,
            max_model_len=self.sizes.max_model_len,
            seed=seed,
        )
        self.load_seconds = time.perf_counter() - start
        log.info("loaded %s in %.1f s, %s", self.folder, self.load_seconds, self.describe())

    def describe(self) -> str:
        """Weights and cache in one line."""
        weights = sum(a.size * a.dtype.itemsize for a in self.model.abstract.values())
        return (
            f"weights {weights / 2**30:.2f} GiB in {self.dtype}, KV cache {self.sizes.bytes / 2**30:.2f} GiB for "
            f"{(self.sizes.num_pages - 1) * self.sizes.page_size} tokens, max_model_len {self.sizes.max_model_len}"
        )

    @property
    def stats(self) -> EngineStats:
        """Tokens and seconds since loading."""
        return self._open_engine().stats

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling (or fetching compiled programs from the cache) since loading."""
        return self._open_engine().runner.compile_seconds

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json asks for; greedy unless it says `do_sample`."""
        given = self._generation_config
        if not given.get("do_sample"):
            return SamplingParams(temperature=0.0)
        names = ("temperature", "top_p", "top_k", "min_p")
        try:
            return SamplingParams(**{n: given[n] for n in names if given.get(n) is not None})
        except ValueError as error:
            raise ValueError(f"{self.folder / 'generation_config.json'}: {error}; or give sampling_params") from None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continues each prompt; outputs come in input order.

        A prompt is text, a list of token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`. One SamplingParams for
        all, or one each; None takes `get_default_sampling_params()`. Raises ValueError for a prompt that can't be
        served, before anything runs.
        """
        return list(self.generate_iter(prompts, sampling_params))

    def generate_iter(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """What `generate` returns, one by one: each as soon as it and those before it are done."""
        engine = self._open_engine()
        listed = _prompt_list(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = sampling_params if isinstance(sampling_params, list | tuple) else [sampling_params] * len(listed)
        if len(params) != len(listed):
            raise ValueError(f"sampling_params: {len(params)} for {len(listed)} prompts; give one for all, or one each")
        generations: list[Generation] = []
        try:
            for i, (prompt, each) in enumerate(zip(listed, params, strict=True)):
                where = f"prompt {i}: " if len(listed) > 1 else ""
                generations.append(self._add(prompt, each, where))
            for generation in generations:
                while generation.request.finish_reason is None:
                    self._open_engine().step()
                yield generation.output()
        finally:
            for generation in generations:  # those still running: an error or Ctrl-C must not leave rows behind
                engine.abort(generation)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one prompt in pieces, as it comes: whole characters, in all exactly `generate`'s text."""
        return (piece for piece, _ in self.stream_output(prompt, sampling_params) if piece)

    def stream_output(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[tuple[str, RequestOutput]]:
        """Pairs of new text and the output so far; the last one is finished."""
        engine = self._open_engine()
        generation = self._add(prompt, sampling_params or self.get_default_sampling_params(), "")

        def pieces() -> Iterator[tuple[str, RequestOutput]]:
            request = generation.request
            finished, seen = False, len(request.tokens)
            try:
                yield "", generation.output()  # taken here, below: a generator that has not begun would not clean up
                while not finished:
                    # Other calls step the engine too, and may have brought this request on, to its end even.
                    while request.finish_reason is None and len(request.tokens) == seen:
                        self._open_engine().step(STREAM_SECONDS)
                    finished, seen = request.finish_reason is not None, len(request.tokens)
                    yield generation.take_text(), generation.output()
            finally:
                engine.abort(generation)

        stream = pieces()
        next(stream)
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
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, a list of `{"role": ..., "content": ...}`, or each of several."""
        one = not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        return self.generate([self.chat_prompt(c, tools, **template_kwargs) for c in conversations], sampling_params)

    def close(self) -> None:
        """Frees weights and cache. What was returned stays; nothing can be asked any more."""
        if self._engine is not None:
            self._engine.runner.close()
            self._engine = None  # type: ignore[assignment]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise ValueError("this LLM was closed: load it again with LLM(...)")
        return self._engine

    def _add(self, prompt: Prompt, params: SamplingParams, where: str) -> Generation:
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params is a {type(params).__name__}: it must be SamplingParams")
        text, ids = self._prompt_ids(prompt, where)
        try:
            return self._open_engine().add(ids, params, text)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None

    def _prompt_ids(self, prompt: Prompt, where: str) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if set(prompt) not in ({"prompt"}, {"prompt_token_ids"}):
                raise ValueError(f"{where}a prompt as a dict has either prompt or prompt_token_ids, not {list(prompt)}")
            (prompt,) = prompt.values()
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"{where}the prompt is empty: give some text")
            return prompt, self.tokenizer.encode(prompt)
        if not _is_ids(prompt):
            raise ValueError(f"{where}a prompt must be a string or a list of token ids, not {type(prompt).__name__}")
        return None, [int(i) for i in prompt]


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, Sequence | np.ndarray) and all(
        isinstance(i, int | np.integer) and not isinstance(i, bool) for i in prompt
    )


def is_single_prompt(prompts: Any) -> bool:
    """Whether this is one prompt, in any of its forms, and not a list of prompts."""
    return isinstance(prompts, str | Mapping) or (len(prompts) > 0 and _is_ids(prompts))


def _prompt_list(prompts: Any) -> list[Prompt]:
    if not isinstance(prompts, str | Mapping | Sequence | np.ndarray):
        raise ValueError(f"prompts: a prompt or a list of them is needed, not {type(prompts).__name__}")
    single: Any = [prompts] if is_single_prompt(prompts) else prompts
    return list(single)


def _check_integer(name: str, value: int | None, low: int, high: int = 2**63) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high):
        raise ValueError(f"{name} is {value!r}: it must be an integer from {low} to {high}")


def _dtype(wanted: str, config: Mapping[str, Any], checkpoint: Checkpoint, device: jax.Device) -> np.dtype[Any]:
    """The dtype to compute in: see LLM."""
    names = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    if wanted != "auto":
        return np.dtype(names[wanted])
    if device.platform == "cpu":
        return np.dtype(np.float32)
    said = config.get("dtype", config.get("torch_dtype"))
    stored = next((info.dtype for info in checkpoint.tensors.values() if info.dtype in FLOATS), np.dtype(np.float32))
    dtype = np.dtype(names[str(said).removeprefix("torch.")]) if str(said).removeprefix("torch.") in names else stored
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability is not None and float(capability) < 8.0 and dtype != np.float32:
        return np.dtype(np.float16)
    return dtype


def _available(device: jax.Device) -> int:
    """Bytes that the KV cache may take on this device, now that the weights are there."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return int(psutil.virtual_memory().total * CPU_SHARE)
    limit = stats["bytes_limit"]
    return max(0, int(limit * (DEVICE_SHARE - RESERVE)) - stats["bytes_in_use"])


def _eos_token_ids(
    folder: Path, generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer_id: int | None
) -> list[int]:
    """All EOS ids of generation_config.json; else those of config.json; else the tokenizer's."""
    found = generation.get("eos_token_id") or eos_token_ids(config, folder / "config.json")
    return found or ([] if tokenizer_id is None else [tokenizer_id])
