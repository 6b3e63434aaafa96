"""The price of quantization, and of merging an adapter: how far a model's next-token distributions (or its vectors, or
classes) move on given texts, and what that saves."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.attention import ForwardBatch, Table
from jaxinfer.benchmark import generate, in_turns, random_work
from jaxinfer.compare_pooled import ClassPrice, VectorPrice, pooled_price
from jaxinfer.convert import Onto, convert
from jaxinfer.engine.background import in_background
from jaxinfer.engine.config import DType
from jaxinfer.engine.loading import Opened, open_model
from jaxinfer.llm import LLM
from jaxinfer.models.tasks import GENERATE
from jaxinfer.quantization.schemes import Quantization, parse_quantization
from jaxinfer.quantization.stored import QUANTIZATION_FIELDS

DECODED = (16, 64)  # tokens of the prompt and of the output of which the speed is measured
RUNS = 3
Adapted = Literal["beside", "merged"]


@dataclass(frozen=True)
class Price:
    """What a scheme costs, and what it saves.

    scheme: None for the model as it is, which the others are compared with.
    tokens: next-token distributions that were compared.
    kl_mean, kl_p99: the Kullback-Leibler divergence of the scheme's from the base's, in nats, its mean and 99th
        percentile.
    top1: share of them with the same likeliest token.
    perplexity: of the texts.
    weight_bytes: of all weights.
    cache_bytes_per_token: of context.
    decode_rate: tokens/s of one sequence, the median of three.
    exact_match: the share of right answers, where questions are given.
    adapter: whether one is beside the weights, or was merged into them before the scheme.
    """

    scheme: str | None
    tokens: int
    kl_mean: float
    kl_p99: float
    top1: float
    perplexity: float
    weight_bytes: int
    cache_bytes_per_token: int
    decode_rate: float
    exact_match: float | None
    adapter: Adapted | None = None


class _Row(NamedTuple):
    """What is compared.

    scheme, adapter: see Price.
    folder, options: of `LLM`.
    """

    scheme: str | None
    adapter: Adapted | None
    folder: Any
    options: dict[str, Any]


def compare(
    model: Any,
    schemes: Sequence[str],
    texts: Iterable[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    base_quantization: Quantization | None = None,
    max_length: int = 512,
    max_tokens: int = 4096,
    right: Callable[[LLM], float] | None = None,
    on_error: Callable[[str, Exception], None] | None = None,
    **options: Any,
) -> Iterator[Price | VectorPrice | ClassPrice]:
    """The prices of the model as it is, then of each scheme, one loaded at a time. options: of `LLM`. A model that
    makes vectors or classes is compared with itself in float32, unless options say another dtype.

    schemes: of weights, by name or by patterns as on the command line, or of the cache as `kv-int8`, or dtypes, or
    folders of the model in another form (with a `/`). adapter: a low-rank one in PEFT's format. All is compared with
    the model as it is and the adapter beside its weights then: the two merged, which is written to disk meanwhile, and
    for each scheme the adapter beside it, and merged before it; folders have it merged. base_quantization: by which the
    adapter's base was quantized when it was trained: all is compared with that, and it is merged onto what is left.
    on_error: told why a scheme is not to be had, before the next one is tried; None: that is raised. right: the share
    of right answers of a model. Of each text the first `max_length` tokens are taken, of all together `max_tokens`, and
    kept on disk for their number times the vocabulary times 4 bytes. Of a model that makes no text they are whole,
    until they have `max_tokens`. Raises ValueError if the texts have no two tokens, or if a folder has another model.
    """
    texts, opened = list(texts), open_model(model, **options)
    pooled = opened.task != GENERATE
    if pooled and adapter is not None:
        raise ValueError(f"{model}: makes no text, and adapters are compared of models that do")
    if adapter is None and base_quantization is not None:
        raise ValueError(f"base_quantization is {base_quantization!r}, and there is no adapter")
    with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory() as own:
        base: np.ndarray[Any, Any] | None = None
        rows = _rows(model, schemes, {"dtype": options.get("dtype", "float32")} if pooled else {})
        if adapter is not None:
            rows = _rows_of_adapter(opened, schemes, adapter, base_quantization, f"{own}/merged")
        for scheme, adapted, folder, more in rows:
            price: Price | VectorPrice | ClassPrice
            try:
                with LLM(folder, **options | more) as llm:
                    if pooled:
                        texts = _texts(llm, texts, max_tokens) if base is None else texts
                        price, numbers = pooled_price(llm, scheme, texts, base, right)
                        base = numbers if base is None else base
                    else:
                        sequences = _sequences(llm, texts, max_length, max_tokens)
                        shape = sum(len(ids) - 1 for ids in sequences), llm.model.config.vocab_size
                        if base is not None and shape != base.shape:
                            raise ValueError(
                                f"{scheme}: cuts texts into other tokens than {model}: it is another model"
                            )
                        if base is None:
                            base = np.memmap(file, np.float32, "w+", shape=shape)
                        price = _price(llm, scheme, sequences, base, right, adapted)
            except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:  # the last one where memory is too small
                if base is None or on_error is None:
                    raise
                on_error(named(scheme, adapted), error)
                continue
            yield price


def named(scheme: str | None, adapter: Adapted | None) -> str:
    """What is compared, for people."""
    how = {None: "", "beside": " + adapter", "merged": ", merged"}
    return f"{scheme or 'as it is'}{how[adapter]}"


def _rows(model: Any, schemes: Sequence[str], base: dict[str, Any]) -> Iterator[_Row]:
    """base: options of the first, with which the others are compared."""
    yield _Row(None, None, model, base)
    for scheme in schemes:
        yield _Row(scheme, None, *((scheme, {}) if "/" in scheme else (model, _options(scheme))))


def _rows_of_adapter(
    opened: Opened, schemes: Sequence[str], adapter: Any, trained_on: Quantization | None, merged: str
) -> Iterator[_Row]:
    """merged: where both are written in one; of a base that is quantized, as what its weights stand for."""
    beside = {"adapters": {"adapter": adapter}}
    stored = any(opened.config.get(name) is not None for name in QUANTIZATION_FIELDS)
    onto: Onto = "dequantized" if stored or trained_on is not None else "original"
    yield _Row(None, "beside", opened.folder, beside | ({} if trained_on is None else {"quantization": trained_on}))
    options: Any = {"adapter": adapter, "onto": onto, "base_quantization": trained_on}
    convert(opened.folder, merged, format="hf", show_progress=False, **options)
    yield _Row(None, "merged", merged, {})
    for scheme in schemes:
        if "/" in scheme:
            yield _Row(scheme, "merged", scheme, {})
            continue
        more = _options(scheme)
        if not (stored and "quantization" in more):
            yield _Row(scheme, "beside", opened.folder, beside | more)
        yield _Row(scheme, "merged", merged, more)


def _price(
    llm: LLM,
    scheme: str | None,
    sequences: Sequence[Sequence[int]],
    base: np.ndarray[Any, Any],
    right: Callable[[LLM], float] | None,
    adapter: Adapted | None,
) -> Price:
    """base: log-probabilities of what is compared with, which are filled in if this is it."""
    count, is_base = len(base), scheme is None and adapter != "merged"
    divergence, same, likelihood, done = np.zeros(count), 0, 0.0, 0
    for ids, ours in zip(sequences, _distributions(llm, sequences), strict=True):
        theirs = base[done : done + len(ours)]
        if is_base:
            theirs[:] = ours
        divergence[done : done + len(ours)] = np.sum(np.exp(theirs) * (theirs - ours), axis=1)
        same += int(np.sum(np.argmax(theirs, axis=1) == np.argmax(ours, axis=1)))
        likelihood += float(np.sum(ours[np.arange(len(ours)), ids[1:]]))
        done += len(ours)
    return Price(
        scheme,
        count,
        float(np.mean(divergence)),
        float(np.quantile(divergence, 0.99)),
        same / count,
        math.exp(min(-likelihood / count, 700)),
        sum(array.nbytes for array in jax.tree.leaves((llm.engine.runner.params, llm.engine.runner.state.adapters))),
        llm.engine.runner.programs.layout.bytes_per_token,
        _decode_rate(llm),
        None if right is None else right(llm),
        adapter,
    )


def _options(scheme: str | None) -> dict[str, Any]:
    """Of `LLM`."""
    if scheme is not None and scheme.startswith("kv-"):
        return {"kv_cache_dtype": scheme.removeprefix("kv-")}
    if scheme is None or scheme in get_args(DType):
        return {"dtype": scheme} if scheme else {}
    return {"quantization": parse_quantization(scheme)}


def _texts(llm: LLM, texts: Sequence[str], max_tokens: int) -> list[str]:
    """Those that are compared, whole."""
    left = max_tokens
    for count, text in enumerate(texts):
        left -= len(llm.tokenizer.encode(text))
        if left < 1:
            return list(texts[: count + 1])
    if not texts:
        raise ValueError("there are no texts to compare")
    return list(texts)


def _sequences(llm: LLM, texts: Sequence[str], max_length: int, max_tokens: int) -> list[list[int]]:
    """Token ids of the texts, as far as they are compared."""
    sequences: list[list[int]] = []
    left = max_tokens
    for text in texts:
        ids = llm.tokenizer.encode(text)[: min(max_length, llm.sizes.max_model_len, left + 1)]
        if len(ids) > 1:
            sequences.append(ids)
            left -= len(ids) - 1
        if left < 1:
            break
    if not sequences:
        raise ValueError("the texts have nothing to compare: at least one must have two tokens")
    return sequences


def _distributions(llm: LLM, sequences: Sequence[Sequence[int]]) -> Iterator[np.ndarray[Any, Any]]:
    """Log-probabilities of the next token, f32 [tokens - 1, V], at all places of each sequence but its last,
    with the adapter that there is."""
    model, vocab, layout = llm.model, llm.model.config.vocab_size, llm.engine.runner.programs.layout
    for name in llm.engine.adapters.infos:
        llm.engine.runner.load_adapter(0, llm.engine.adapters.find(name))
    given = llm.engine.runner.params, llm.engine.runner.state.adapters

    @jax.jit
    def run(params: Any, adapters: Any, batch: ForwardBatch) -> jax.Array:
        cache, slot = None, jnp.zeros_like(batch.tokens) if adapters else None
        if layout.dtype != model.dtype:  # what is seen is what was written: page 1 holds a whole sequence
            length = batch.tokens.shape[0]
            batch = dataclasses.replace(batch, layers=layout.layer_map(length))
            shapes = layout.arrays([1 + len(layout.groups)] * len(layout.pools), length, 1)
            cache = jax.tree.map(lambda pool: jnp.zeros(pool.shape, pool.dtype), shapes)
        logits, _ = model.bind(params, adapters, slot)(batch, cache)
        return jax.nn.log_softmax(logits[:, :vocab].astype(jnp.float32), axis=-1)

    compiled: dict[int, Any] = {}
    for ids in sequences:
        length = 1 << (len(ids) - 1).bit_length()
        batch = ForwardBatch.of_sequences([list(ids)], length)
        tables = tuple(
            None if group.pool is None else Table(jnp.full((1, 1), 1 + i, jnp.int32))
            for i, group in enumerate(layout.groups)
        )
        batch = dataclasses.replace(batch, tables=tables, slots=jnp.zeros(1, jnp.int32))
        if length not in compiled:
            with in_background(lambda arguments: run.lower(*arguments).compile(), [(*given, batch)]) as (future,):
                compiled[length] = future.result()
        yield np.asarray(compiled[length](*given, batch))[: len(ids) - 1]


def _decode_rate(llm: LLM) -> float:
    prompt, output = (min(n, llm.sizes.max_model_len // 2) for n in DECODED)
    work = in_turns(random_work(llm.model.config.vocab_size, [prompt], [output]), list(llm.engine.adapters.infos))
    generate(llm, work)
    times = [generate(llm, work)[0] for _ in range(RUNS)]
    return output / float(np.median(times))
