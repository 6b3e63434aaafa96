"""One call does it: `generate`, `stream`, `chat`, `embed` on a model that stays loaded for the next call."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from jaxinfer.aliases.loading import LOADING
from jaxinfer.aliases.sampling import SAMPLING
from jaxinfer.demo import ENCODER_DIR, MODEL_DIR
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.outputs import RequestOutput
from jaxinfer.engine.prompts import Prompt, is_single_conversation, is_single_prompt
from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.llm import LLM, Message
from jaxinfer.sampling.params import DEFAULT_MAX_TOKENS, SamplingParams
from jaxinfer.tasks.pooling import Text

_SAMPLING = [field.name for field in dataclasses.fields(SamplingParams)]
# Sampling and LLM both have a seed: here it is the request's.
_LOADING = set(EngineConfig.__annotations__) - set(_SAMPLING)

_TEMPLATE = ("tools", "chat_template", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
_EMBEDDING = ("prompt_name", "prompt", "dimensions", "normalize", "truncate", "truncate_prompt_tokens")
_UNSEEN = {"n": 1, "logprobs": None, "prompt_logprobs": None, "detokenize": True}

_loaded: tuple[tuple[Any, ...], LLM] | None = None
_users = 0  # calls that run on it
_changed = threading.Condition()  # of both


@overload
def generate(prompts: Any, model: str | os.PathLike[str] | None = None, *, schema: Any, **options: Any) -> Any: ...
@overload
def generate(prompts: str, model: str | os.PathLike[str] | None = None, **options: Any) -> str: ...
@overload
def generate(prompts: Sequence[str], model: str | os.PathLike[str] | None = None, **options: Any) -> list[str]: ...
def generate(
    prompts: Any,
    model: str | os.PathLike[str] | None = None,
    *,
    schema: Any = None,
    adapter: Any = None,
    **options: Any,
) -> Any:
    """The continuation of a prompt, or of each of a list of prompts, in input order.

    model: a folder or hub id; None is the small model that ships with the package. It stays loaded for the next call
    with the same model and options; another one takes its place, so there is one in memory at a time.
    schema: the text is JSON of this schema, without properties that it does not name, and what comes back is not the
    text but what it says: of a class with pydantic's methods an object of it, else a value as json.loads has it.
    adapter: the name of one of `adapters`, which is an option: {"name": folder}; one for all, or a list of one each.
    options: those of SamplingParams (max_tokens, here 256 unless given, temperature, top_p, seed, stop, ...; what is
    not given is as the checkpoint's generation_config.json says) and of LLM (dtype, max_model_len, ...).
    Raises ValueError or OSError with one line: what is wrong, where, what to do.
    """
    with _prepared(model, options, schema) as (llm, params):
        outputs = llm.generate(prompts, params, adapter=adapter, use_tqdm=False)
        results = [_result(output, schema) for output in outputs]
    return results[0] if is_single_prompt(prompts) else results


def stream(
    prompt: Prompt, model: str | os.PathLike[str] | None = None, *, adapter: Any = None, **options: Any
) -> Iterator[str]:
    """The continuation of a prompt in pieces as they come; adapter and options as for `generate`."""
    with _prepared(model, options) as (llm, params):
        return llm.stream(prompt, params, adapter=adapter)


@overload
def chat(messages: Any, model: str | os.PathLike[str] | None = None, *, schema: Any, **options: Any) -> Any: ...
@overload
def chat(messages: Sequence[Message], model: str | os.PathLike[str] | None = None, **options: Any) -> str: ...
@overload
def chat(
    messages: Sequence[Sequence[Message]], model: str | os.PathLike[str] | None = None, **options: Any
) -> list[str]: ...
def chat(
    messages: Any,
    model: str | os.PathLike[str] | None = None,
    *,
    schema: Any = None,
    adapter: Any = None,
    **options: Any,
) -> Any:
    """The answer to a conversation, a list of `{"role": ..., "content": ...}`, or to each of a list of them, through
    the checkpoint's chat template.

    Schema, adapter and options as for `generate`, and what `LLM.chat` takes for the template: `tools`, a list of
    functions or JSON schemas, `chat_template`, `add_generation_prompt`, `chat_template_kwargs`.
    """
    template = {name: options.pop(name) for name in _TEMPLATE if name in options}
    with _prepared(model, options, schema) as (llm, params):
        outputs = llm.chat(messages, params, adapter=adapter, use_tqdm=False, **template)
        results = [_result(output, schema) for output in outputs]
    return results[0] if is_single_conversation(messages) else results


def embed(texts: Text | Sequence[Text], model: str | os.PathLike[str] | None = None, **options: Any) -> np.ndarray:
    """The vectors f32[N, D] of a list of texts, in input order; of a single text f32[D].

    model: a folder or hub id; None is the small encoder that ships with the package, which knows the questions of its
    demo. It stays loaded as for `generate`. options: those of LLM.embed (prompt_name, dimensions,
    normalize, truncate, ...) and of LLM (dtype, mesh, ...). Raises what they raise.
    """
    own = {name: value for name, value in options.items() if name in _EMBEDDING}
    load = LOADING.translated({name: value for name, value in options.items() if name not in own}, _LOADING | {"seed"})
    with _held(ENCODER_DIR if model is None else model, load) as llm:
        outputs = llm.embed(texts, use_tqdm=False, **own)
    vectors = [output.outputs.embedding for output in outputs]
    single = is_single_prompt(texts)
    return vectors[0] if single else np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)


def unload() -> None:
    """Frees the model that `generate`, `stream`, `chat` and `embed` keep loaded, once no other thread is in one of
    them. A stream that is not at its end then ends with an error."""
    with _changed:
        _unload()


def _result(output: RequestOutput, schema: Any) -> Any:
    """The text, or what it says where it is JSON of a schema."""
    if output.error is not None:
        raise ValueError(output.error)
    completion = output.outputs[0]
    if schema is None:
        return completion.text
    if completion.finish_reason == "length":
        raise ValueError(
            f"the JSON is not complete after {len(completion.token_ids)} tokens: raise max_tokens, or bound its schema"
        )
    parse = getattr(schema, "model_validate_json", json.loads)
    return parse(completion.text)


@contextlib.contextmanager
def _prepared(
    model: str | os.PathLike[str] | None, options: dict[str, Any], schema: Any = None
) -> Iterator[tuple[LLM, SamplingParams]]:
    """The model, which no other thread replaces meanwhile, and parameters. Checks all options before anything is
    loaded."""
    if isinstance(model, SamplingParams) or not {"sampling_params", "params"}.isdisjoint(options):
        raise RequestError(
            "sampling parameters are given by name, as max_tokens=16; LLM.generate takes them as they are",
            "sampling_params",
        )
    load, sampling = _split(options)
    if schema is not None:
        if "structured_outputs" in sampling:
            raise RequestError("schema is structured_outputs with json: leave one of them out", "schema")
        sampling["structured_outputs"] = {"json": schema, "disable_additional_properties": True}
    checked = SamplingParams(**sampling)
    for name, default in _UNSEEN.items():
        if getattr(checked, name) != default:
            raise UnsupportedError(
                f"{name} does not show in the text that is returned: use jaxinfer.LLM(...).generate", name
            )
    with _held(MODEL_DIR if model is None else model, load) as llm:
        llm.tokenizer.require("text that is returned", "use jaxinfer.LLM(...).generate, which gives token ids")
        yield llm, llm.get_default_sampling_params().with_changes(**sampling)


@contextlib.contextmanager
def _held(model: str | os.PathLike[str], load: dict[str, Any]) -> Iterator[LLM]:
    """The model, which no other thread replaces meanwhile."""
    global _users
    with _changed:
        llm = _load(model, load)
        _users += 1
    try:
        yield llm
    finally:
        with _changed:
            _users -= 1
            _changed.notify_all()


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of loading, in our words, and those of sampling. Raises one ValueError for all that are not known."""
    params = {name: value for name, value in options.items() if name not in _LOADING and not _loads(name)}
    sampling, problems = SAMPLING.read(params, _SAMPLING)
    load, more = LOADING.read({name: value for name, value in options.items() if name not in params}, _LOADING)
    if more:
        both = (SAMPLING.refusal(problems, _SAMPLING) if problems else "", LOADING.refusal(more, ()))
        raise RequestError("; ".join(filter(None, both)), next(iter({**problems, **more})))
    if problems:
        raise SAMPLING.error(problems, _SAMPLING)
    return load, params if "max_tokens" in sampling else {"max_tokens": DEFAULT_MAX_TOKENS} | params


def _loads(name: str) -> bool:
    """Whether another program's option is one of loading."""
    return name in LOADING and name not in SAMPLING and name not in _SAMPLING


def _load(model: str | os.PathLike[str], options: dict[str, Any]) -> LLM:
    global _loaded
    # Who is told of the progress makes no difference to the model; a lambda is a new one at each call.
    key = (os.fspath(model), *sorted((name, value) for name, value in options.items() if name != "on_progress"))
    _changed.wait_for(lambda: not _users or (_loaded is not None and _loaded[0] == key))
    if _loaded is None or _loaded[0] != key:
        _unload()
        _loaded = (key, LLM(model, **options))
    return _loaded[1]


def _unload() -> None:
    global _loaded
    _changed.wait_for(lambda: not _users)
    if _loaded is not None:
        _loaded[1].close()
        _loaded = None
