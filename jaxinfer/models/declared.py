"""What an architecture makes of a config.json, as far as others than its module ask; kept for the next start.

A start whose programs are compiled traces nothing, and so needs no module: with this, neither the files of families nor
Flax are imported then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from jaxinfer.cache import (
    ChunkedSpec,
    FullAttentionSpec,
    KVCacheSpec,
    LatentSpec,
    RecurrentSpec,
    SharedSpec,
    SlidingWindowSpec,
)
from jaxinfer.layers.classifier_config import ClassifierConfig
from jaxinfer.models import registry
from jaxinfer.models.config import ModelConfig, describe_config
from jaxinfer.models.params import ParamSpec
from jaxinfer.models.sources import Concat, OneOf, Part, Renamed, Row, Stack, Strided, Tensor, Transposed
from jaxinfer.models.weights import ParamMapping
from jaxinfer.private_folder import PrivateFolder

T = TypeVar("T")
log = logging.getLogger("jaxinfer")
MOST = 64  # values that are kept


@dataclass(frozen=True)
class Declared:
    """Of a configuration.

    config: what the engine needs to know of it.
    described: all of it, as JSON: what compiled programs depend on.
    weights: how checkpoints differ from the module; where weights are found is in their specs.
    built_in: it is an architecture of this package's own.
    """

    config: ModelConfig
    described: str
    weights: ParamMapping
    built_in: bool

    @classmethod
    def of(cls, data: Mapping[str, Any], max_model_len: int | None = None) -> Declared:
        """Of a config.json's content. max_model_len: see `ModelConfig.for_length`. Raises ValueError."""
        architecture, config = registry.parse_config(data)
        config = config.for_length(max_model_len)
        base = ModelConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig)})
        built_in = architecture.build.__module__.partition(".")[0] == __name__.partition(".")[0]
        described = json.dumps(describe_config(config), sort_keys=True)
        return cls(base, described, replace(architecture.weights(config), source=Tensor), built_in)


@dataclass(frozen=True)
class DeclaredModule:
    """Of a module.

    params: its weights, none of them quantized.
    cache_specs: what each layer keeps of a sequence.
    head: names of the weights that logits of words are made with.
    """

    params: tuple[ParamSpec, ...]
    cache_specs: tuple[KVCacheSpec | None, ...]
    head: tuple[str, ...]


TYPES = {
    kind.__name__: kind
    for kind in (
        *(Declared, DeclaredModule, ModelConfig, ClassifierConfig, ParamMapping, ParamSpec),
        *(Tensor, Renamed, Transposed, Row, Part, Strided, Stack, Concat, OneOf),
        *(FullAttentionSpec, SlidingWindowSpec, ChunkedSpec, LatentSpec, RecurrentSpec, SharedSpec),
    )
}


class Declarations:
    """What was declared in earlier starts, by all that it is made from.

    folder: where; None: nowhere.
    code: what tells this version of the package, and of what it stands on, from others.
    """

    def __init__(self, folder: PrivateFolder | None = None, code: str = ""):
        self._folder, self._code = folder, code

    def config(self, data: Mapping[str, Any], max_model_len: int | None = None) -> Declared:
        """See `Declared.of`."""
        of = data, max_model_len
        return self._get(Declared, lambda: Declared.of(*of), lambda declared: declared.built_in, *of)

    def module(
        self,
        declared: Declared,
        data: Mapping[str, Any],
        max_model_len: int | None,
        dtypes: tuple[object, ...],
        make: Callable[[], DeclaredModule],
    ) -> DeclaredModule:
        """Of the module of what was `declared`. dtypes: those that weights may have."""
        return self._get(DeclaredModule, make, lambda _: declared.built_in, data, max_model_len, *map(str, dtypes))

    def _get(self, kind: type[T], make: Callable[[], T], kept: Callable[[T], bool], *key: object) -> T:
        if self._folder is None:
            return make()
        # Families that somebody registered are not known here, but that there are such is.
        text = json.dumps([self._code, str(registry.REGISTRY), kind.__name__, *key], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        if (found := self._find(self._folder, name, kind)) is not None:
            return found
        value = make()
        if kept(value):
            try:
                self._folder.write(name, json.dumps(encode(value)).encode())
            except OSError as error:
                log.warning("%s: %s; it is not kept for the next start", self._folder.path / name, error.strerror)
        return value

    @staticmethod
    def _find(folder: PrivateFolder, name: str, kind: type[T]) -> T | None:
        """What is kept under this name; None if nothing is. What can't be read is removed, and said."""
        try:
            found = decode(json.loads(folder.read(name)))
            if not isinstance(found, kind):
                raise ValueError(f"it is a {type(found).__name__}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            log.warning("%s: %s; it is made anew", folder.path / name, error)
            folder.remove(name)
            return None
        folder.use(name, MOST)
        return found


def encode(value: object) -> Any:
    """For JSON: one of TYPES by its name, with its fields in their order."""
    if isinstance(value, np.dtype):
        return {"dtype": str(value)}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}  # type: ignore[arg-type]
    if type(value) is ParamMapping:
        del fields["source"]
    name = type(value).__name__
    assert TYPES[name] is type(value), name
    return {name: {field: encode(item) for field, item in fields.items()}}


def decode(value: Any) -> Any:
    """It again. Raises ValueError, TypeError or LookupError for what `encode` does not make."""
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    ((name, content),) = value.items()
    if name == "dtype":
        return jnp.dtype(content)
    return TYPES[name](**{field: decode(item) for field, item in content.items()})
