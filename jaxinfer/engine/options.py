"""What can be said of how a model is loaded, and whether it is right. No JAX here: it is checked before JAX starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, cast, get_args

from jaxinfer.aliases.loading import LOADING, spelt
from jaxinfer.quantization.schemes import Quantization, check_quantization

DType = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "xla", "pallas"]
KVCacheDType = Literal["auto", "int8", "fp8"]
NONE_IS_DEFAULT = ("seed", "enable_prefix_caching")  # as in vLLM
KINDS: dict[str, tuple[Any, str]] = {
    "seed": (int, "an integer"),
    "page_size": (int | None, "an integer"),
    "revision": (str | None, "a string"),
    "compiled": (str | os.PathLike | None, "a folder or a URL"),
    "mesh": (str | None, "a string such as tensor=4"),
    "enable_prefix_caching": (bool, "true or false"),
    "warmup": (bool, "true or false"),
    "architecture": (Mapping | None, "fields of a config.json"),
}


class LoadOptions(TypedDict, total=False):
    """What `LLM` and `AsyncEngine` take besides the model. vLLM's names of the same are taken, too, and for others that
    it has the error says what to do (see `jaxinfer.aliases`).

    dtype: of weights, activations and cache. "auto" is what the checkpoint says on TPU and GPU (float16 on GPUs
        without bfloat16). On CPU "bfloat16" is of matrices: activations and cache stay float32, and only products of
        16 tokens and more round activations; "auto" is that for checkpoints in bfloat16, and float32 for all others,
        for meshes that split weights, and without the kernels for CPUs (see `jaxinfer doctor`).
    max_model_len: most tokens of prompt and output together. None: what config.json says, or what fits.
    seed: of requests that have no seed of their own.
    revision, token: of a hub id, as huggingface_hub has them.
    max_num_seqs: most sequences that run at once (256; 64 on CPU). max_num_batched_tokens: most tokens of one device
        call (2,048; 512 on CPU): longer prompts go in chunks. page_size: tokens a page of the cache (16; on TPU
        64, or what long sequences need).
    memory_utilization: share of an accelerator's memory for weights, cache and all else (0.9). On CPU the cache takes
        at most 10% of the machine's memory.
    kv_cache_memory: bytes of the KV cache on each device. None: what `max_num_seqs` sequences need, as far as there is
        room.
    enable_prefix_caching: sequences with the same beginning share its pages (on).
    warmup: compile every program that can be needed now, so that nothing compiles later (off).
    on_progress: told, in a few words, what is being waited for.
    kv_cache_dtype: of keys and values. "auto" is the dtype of activations. "int8", "fp8" (e4m3): rounded, with a scale
        for each token and head. The kernel for TPUs knows no scales, and of the two only "fp8": there keys and values
        are rounded as they are, and clipped to 448.
    attention: what attends to the cache. "auto": on TPU a Pallas kernel that reads pages in place, where it can be
        used, and plain XLA elsewhere. "xla", "pallas": that one. On NVIDIA GPUs the kernel has never been run.
    mesh: how devices share the work, "data=2,tensor=4". `tensor` splits every weight's product, `data` the sequences,
        `fsdp` sequences and weights, which are gathered layer by layer. None: on TPU and GPU all of this host's, as
        many of them in `tensor` as the model's heads allow, the rest in `data`; on CPU one. max_num_seqs and
        max_num_batched_tokens are of all of them together.
    compiled: a folder or URL of programs that `jaxinfer compile` has made. Options that are not given are then those
        that it was made with, and nothing compiles; where it is for something else, a warning says what differs.
    quantization: weights in fewer bits, quantized while they are loaded: "int8" (one scale for each output channel),
        "int8-w8a8" (activations too, one scale for each token), "int4" (one scale for 32 inputs of a channel),
        "int4-g128" (for 128 of them), "fp8" (e4m3, one scale for each output channel), "fp8-block" (for 128x128
        weights); for all matrices but embeddings. Or patterns of weight names with one of these or "none" each, of
        which the first that fits decides: {"*.mlp.*": "int8"}. None: as they are, also those of a checkpoint that is
        quantized already, for which nothing else is taken.
    architecture: fields of the model's config.json, as a deployment has them: another model is refused. None: any.
    """

    dtype: DType
    max_model_len: int | None
    seed: int
    revision: str | None
    token: str | bool | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    page_size: int | None
    memory_utilization: float
    kv_cache_memory: int | None
    enable_prefix_caching: bool
    warmup: bool
    on_progress: Callable[[str], None] | None
    mesh: str | None
    attention: Attention
    kv_cache_dtype: KVCacheDType
    compiled: str | os.PathLike[str] | None
    architecture: Mapping[str, Any] | None
    quantization: Quantization | None


def in_our_words(options: Mapping[str, Any]) -> LoadOptions:
    """Options that may have other programs' names and spellings. Raises one ValueError for all that are not known."""
    found = LOADING.translated(options, LoadOptions.__annotations__)
    found = {name: spelt(name, value) for name, value in found.items()}
    return cast(LoadOptions, {n: value for n, value in found.items() if value is not None or n not in NONE_IS_DEFAULT})


def check_options(options: Mapping[str, Any]) -> LoadOptions:
    """All options, where they are not given as they are by default. Raises ValueError that names one."""
    given: LoadOptions = {
        "dtype": "auto",
        "max_model_len": None,
        "seed": 0,
        "revision": None,
        "token": None,
        "max_num_seqs": None,
        "max_num_batched_tokens": None,
        "page_size": None,
        "memory_utilization": 0.9,
        "kv_cache_memory": None,
        "enable_prefix_caching": True,
        "warmup": False,
        "on_progress": None,
        "mesh": None,
        "attention": "auto",
        "kv_cache_dtype": "auto",
        "compiled": None,
        "architecture": None,
        "quantization": None,
    }
    given.update(in_our_words(options))
    chosen = {"dtype": DType, "attention": Attention, "kv_cache_dtype": KVCacheDType}
    for name, choices in ((name, get_args(kind)) for name, kind in chosen.items()):
        value = given[name]  # type: ignore[literal-required]
        if value not in choices:
            raise ValueError(f"{name} is {value!r:.100}: it must be one of {', '.join(choices)}")
    _check_integer("seed", given["seed"], 0, 2**31 - 1)
    _check_integer("max_model_len", given["max_model_len"], 2)
    _check_integer("max_num_seqs", given["max_num_seqs"], 1, 4096)
    _check_integer("max_num_batched_tokens", given["max_num_batched_tokens"], 1, 2**20)
    _check_integer("page_size", given["page_size"], 1, 2**20)
    _check_integer("kv_cache_memory", given["kv_cache_memory"], 1)
    check_quantization(given["quantization"])
    share = given["memory_utilization"]
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"memory_utilization is {share!r}: it must be a number above 0 and at most 1")
    for name, (kind, wanted) in KINDS.items():
        value = given[name]  # type: ignore[literal-required]
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r:.100}: it must be {wanted}")
    return given


def _check_integer(name: str, value: int | None, low: int, high: int = 2**63) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high):
        raise ValueError(f"{name} is {value!r}: it must be an integer from {low} to {high}")
