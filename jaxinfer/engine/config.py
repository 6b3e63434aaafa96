"""What can be said of how a model is loaded, and whether it is right: one declaration of it, from which the command
line, deployments in YAML, the documentation and all checks derive. No JAX here: it is checked before JAX starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypedDict, cast, get_args, get_type_hints

from jaxinfer.aliases.loading import LOADING, spelt, without_lora
from jaxinfer.engine.option import Declared, Option, check_adapters, check_pooler_config
from jaxinfer.quantization.schemes import SCHEMES, Quantization, check_quantization

DType = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "xla", "pallas", "paged", "jax", "tokamax"]
KVCacheDType = Literal["auto", "float32", "bfloat16", "int8", "fp8"]
Runner = Literal["auto", "generate", "pooling"]
Convert = Literal["auto", "none", "embed", "classify"]


class EngineConfig(TypedDict, total=False):
    """What `LLM` and `AsyncEngine` take besides the model; docs/options.md says what each means. vLLM's names of the
    same are taken, too, and for others that it has the error says what to do (see `jaxinfer.aliases`)."""

    dtype: Annotated[
        DType,
        Option(
            "auto",
            help="Of weights and cache; auto, as without it: the checkpoint's, if it is fast here.",
            details="of weights, activations and cache: `float32`, `bfloat16`, `float16`; `auto` is what the "
            "checkpoint says (float16 on GPUs without bfloat16). On CPU `bfloat16` is of matrices and cache, "
            "activations stay float32 (where AVX-512 is, kernels make two bfloat16 of each on the way from 5 tokens a "
            "call on, and one from 16 on, so that log-probabilities depend a little on how many there are: in "
            "`float32` they do not), and `auto` is float32 for checkpoints in float16, for meshes that split "
            "weights, and where the [CPU kernels](architecture.md#kernels-for-cpus) are not (`jaxinfer doctor` "
            "says it)",
            shapes_programs=True,
        ),
    ]
    quantization: Annotated[
        Quantization | None,
        Option(
            help=f"Of weights: {', '.join(SCHEMES)}; or by patterns of names: '*.mlp.*=int4,*=none'.",
            details="of weights, while they are loaded: `int8` (one scale for each output channel), `int8-w8a8` "
            "(activations too, one for each token), `int4` and `int4-g128` (one scale for 32 or 128 inputs of a "
            "channel), `nf4` (one of 16 quantiles of the normal distribution, one scale for 64 inputs), `mxfp4` "
            "(e2m1, a power of two for 32 inputs, as gpt-oss has it), `fp8` (e4m3) and `fp8-block` (one scale for "
            "128x128 weights); for all matrices but embeddings. "
            "Or patterns of weight names with one of these or `none` each, of which the first that fits decides: "
            '`{"*.mlp.*": "int8"}`. A checkpoint that is quantized already stays as it is, and takes nothing else. It '
            "saves memory everywhere, and time where decoding is bound by it; on CPU `fp8-block` is slower, as "
            "there is no such product there",
            metavar="SCHEME",
            check=check_quantization,
            shapes_programs=True,
        ),
    ]
    kv_cache_dtype: Annotated[
        KVCacheDType,
        Option(
            "auto",
            help="Of keys and values; auto, as without it: `dtype`.",
            details="of keys and values: `float32`, `bfloat16`, or `int8` and `fp8` (e4m3) with a scale for each token "
            "and head; `auto` is `dtype`. With `attention='jax'` `fp8` alone, without scales and clipped to 448, where "
            "a device has more than one key/value head. Models without attention have none",
            shapes_programs=True,
        ),
    ]
    max_model_len: Annotated[
        int | None,
        Option(
            help="Most tokens of prompt and answer together.",
            details="most tokens of prompt and output together; default: what the checkpoint is made for, or what fits "
            "in the cache; with longrope it [decides on the factors](models.md)",
            metavar="N",
            low=2,
            shapes_programs=True,
        ),
    ]
    kv_cache_memory: Annotated[
        int | None,
        Option(
            details="bytes of the KV cache on each device; default: what `max_num_seqs` sequences need, at most 10% of "
            "a CPU machine's memory or what is free below 85% of an accelerator's"
        ),
    ]
    max_num_seqs: Annotated[
        int | None,
        Option(
            help="Most sequences that run at once.",
            details="most sequences that run at once, on all devices together (256; 64 on CPU); more wait",
            metavar="N",
            high=4096,
            shapes_programs=True,
        ),
    ]
    max_num_batched_tokens: Annotated[
        int | None,
        Option(
            help="Most tokens of one device call.",
            details="most tokens of one call of the devices, all together (2,048; 512 on CPU); longer prompts go in "
            "pieces",
            metavar="N",
            high=2**20,
            shapes_programs=True,
        ),
    ]
    page_size: Annotated[
        int | None,
        Option(
            details="tokens a page of the cache (16, on TPU 64, or what long sequences need)",
            high=2**20,
            shapes_programs=True,
        ),
    ]
    memory_utilization: Annotated[
        float,
        Option(0.9, details="share of an accelerator's memory that is used in all (0.9)", low=0, high=1),
    ]
    enable_prefix_caching: Annotated[
        bool,
        Option(
            True,
            details="prompts with the same beginning share its pages and its work (on); "
            'those with a `cache_salt`, `{"prompt": …, "cache_salt": …}`, only with the same one',
            none_is_default=True,
        ),
    ]
    warmup: Annotated[
        bool,
        Option(
            False,
            details="compile every program that can be needed while loading, so that nothing compiles later (off)",
        ),
    ]
    mesh: Annotated[
        str | None,
        Option(
            help="Devices that share the model: tensor=4; without it, all that can on TPU and GPU, one on CPU.",
            details="how devices share the work: `tensor=4`, `data=2,tensor=4`, `fsdp=8`. `tensor` splits every "
            "weight's product, `data` the sequences, `fsdp` sequences and weights, which are gathered layer by layer; "
            "experts are split over all devices, or over as many as `expert=4` says, and are there several times then; "
            "default: on TPU and GPU all of this host's, as many of them in `tensor` as the model's heads allow, the "
            "rest in `data`; on CPU one",
            metavar="SPEC",
            must_be="a string such as tensor=4",
            shapes_programs=True,
        ),
    ]
    attention: Annotated[
        Attention,
        Option(
            "auto",
            help="What reads the cache; auto, as without it: a Pallas kernel on TPU, plain XLA elsewhere.",
            details="`xla`: plain XLA; `pallas`: a kernel that reads pages in place, on TPUs and on NVIDIA GPUs from "
            "A100 on, and nobody has run either yet; on TPUs that is `paged`, jaxinfer's own, and there are JAX's "
            "(`jax`) and tokamax's (`tokamax`), which know fewer models and caches; `auto` (default): `pallas` on TPU "
            "where it can be used, else `xla`",
            shapes_programs=True,
        ),
    ]
    adapters: Annotated[
        Mapping[str, str | os.PathLike[str]] | None,
        Option(
            details='low-rank adapters in PEFT\'s format beside the weights, by name: `{"sql": "DIR or hub id"}`; see '
            "[adapters](adapters.md)",
            check=check_adapters,
        ),
    ]
    max_adapters: Annotated[
        int | None,
        Option(
            help="Most adapters that rows of one call may have.",
            details="most adapters that the rows of one call may have; default: as many as `adapters` are, at most 8. "
            "More can be loaded, and take turns",
            metavar="N",
            high=256,
            shapes_programs=True,
        ),
    ]
    max_lora_rank: Annotated[
        int | None,
        Option(
            help="Largest rank of an adapter.",
            details="largest rank of an adapter; default: that of `adapters`, or 16",
            metavar="N",
            high=1024,
            shapes_programs=True,
        ),
    ]
    max_host_adapters: Annotated[
        int | None,
        Option(
            help="Most adapters in the host's memory.",
            details="most adapters in the host's memory besides those that requests have; others are read again from "
            "their folders when they are asked for; default: all",
            metavar="N",
        ),
    ]
    adapted_vocabulary: Annotated[
        bool | None,
        Option(
            details="adapters may change the table that tokens are looked up in, and the head; default: whether one of "
            "`adapters` does",
            shapes_programs=True,
        ),
    ]
    adapted_experts: Annotated[
        bool | None,
        Option(
            details="adapters may change experts, which takes a factor for each of them; default: whether one of "
            "`adapters` does",
            shapes_programs=True,
        ),
    ]
    compiled: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="Programs that jaxinfer compile has made, so that nothing compiles; as trusted as code.",
            details="a folder or URL of programs that `jaxinfer compile` has made. Options that are not given are then "
            "those that it was made with, and nothing compiles; where it is for something else, a warning says what "
            "differs",
            metavar="DIR",
            must_be="a folder or a URL",
        ),
    ]
    revision: Annotated[
        str | None,
        Option(
            help="Branch, tag or commit of a model on the hub.",
            details="of a model on the hub: a branch, tag or commit",
            metavar="R",
            must_be="a string",
        ),
    ]
    token: Annotated[
        str | bool | None,
        Option(
            details="of the hub, as huggingface_hub has it",
            must_be="a string, true or false",
            is_data=False,  # it is a secret
            of_process_0=True,
        ),
    ]
    tokenizer: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="Folder or hub id of another tokenizer; without it, the model's.",
            details="a folder or hub id of tokenizer and chat template, in place of the model's own. Without any, "
            "prompts and outputs are token ids",
            metavar="T",
            must_be="a folder or a hub id",
            of_process_0=True,
        ),
    ]
    skip_tokenizer_init: Annotated[bool, Option(False, details="load no tokenizer (off)", of_process_0=True)]
    runner: Annotated[
        Runner,
        Option(
            "auto",
            details="`generate`, or `pooling` for vectors and classes of whole texts; `auto` (default): what the "
            "checkpoint is for, by its class and by the modules of a sentence-transformers folder",
        ),
    ]
    convert: Annotated[
        Convert,
        Option(
            "auto",
            details="what a model that generates is loaded for instead: `embed` or `classify`; `auto` and `none`: what "
            "the checkpoint is for",
        ),
    ]
    pooler_config: Annotated[
        Mapping[str, Any] | None,
        Option(
            details='how tokens\' vectors become a text\'s: `{"pooling_type": "MEAN", "normalize": True}`, or `CLS` or '
            "`LAST`; default: what a sentence-transformers folder says, and of a language model the last token's, "
            "normalized. `ALL` and `STEP` are of models whose tokens each have numbers of their own (`LLM.reward`, "
            "`LLM.encode`), `STEP` with `step_tag_id` and `returned_token_ids`: see [embeddings](embeddings.md)",
            check=check_pooler_config,
        ),
    ]
    hf_overrides: Annotated[
        Mapping[str, Any] | None,
        Option(
            details="fields that a `config.json` is to have, of models that embed, classify or score; above all vLLM's "
            'for rerankers: `{"classifier_from_token": ["no", "yes"], "is_original_qwen3_reranker": True}`',
            must_be="fields of a config.json",
        ),
    ]
    architecture: Annotated[
        Mapping[str, Any] | None,
        Option(
            details="fields of a `config.json`; a model that says otherwise is refused",
            must_be="fields of a config.json",
        ),
    ]
    seed: Annotated[
        int,
        Option(0, details="for requests without a seed of their own", low=0, high=2**31 - 1, none_is_default=True),
    ]
    on_progress: Annotated[
        Callable[[str], None] | None,
        Option(
            details="a function that is told, in a few words, what loading waits for",
            must_be="a function of a string",
            is_data=False,
            of_process_0=True,
        ),
    ]


OPTIONS = {name: Declared(*get_args(hint)) for name, hint in get_type_hints(EngineConfig, include_extras=True).items()}


def which(**wanted: bool) -> tuple[str, ...]:
    """The names of the options of which this is said, as is_data=True."""
    return tuple(
        name
        for name, declared in OPTIONS.items()
        if all(getattr(declared.option, what) == value for what, value in wanted.items())
    )


NONE_IS_DEFAULT = which(none_is_default=True)


def in_our_words(options: Mapping[str, Any]) -> EngineConfig:
    """Options that may have other programs' names and spellings. Raises one ValueError for all that are not known."""
    settings = LOADING.translated(without_lora(options), OPTIONS)
    settings = {name: spelt(name, value) for name, value in settings.items()}
    return cast(
        EngineConfig, {n: value for n, value in settings.items() if value is not None or n not in NONE_IS_DEFAULT}
    )


def check_options(options: Mapping[str, Any]) -> EngineConfig:
    """All options, where they are not given as they are by default. Raises ValueError that names one."""
    settings = {name: declared.option.default for name, declared in OPTIONS.items()} | in_our_words(options)
    for name, value in settings.items():
        OPTIONS[name].check(name, value)
    if settings["skip_tokenizer_init"] and settings["tokenizer"] is not None:
        raise ValueError(f"tokenizer is {settings['tokenizer']!r:.100}, and skip_tokenizer_init says to load none")
    return cast(EngineConfig, settings)
