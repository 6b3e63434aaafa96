"""The architecture of the text model that is inside of another one: see wrapped."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxinfer.errors import CheckpointError
from jaxinfer.models.architecture import Architecture
from jaxinfer.models.config import PER_LAYER, ConfigReader
from jaxinfer.models.sources import Renamed, Source
from jaxinfer.models.tasks import BOTH_WAYS
from jaxinfer.models.weights import ParamMapping
from jaxinfer.models.wrapped import TEXT, TIED, Wrapped


def text_architecture(wrapped: Wrapped, data: Mapping[str, Any]) -> Architecture:
    """It reads all of config.json's content, and finds the text model's tensors. Raises CheckpointError."""
    text: Architecture = importlib.import_module(_module(wrapped, data)).ARCHITECTURE
    return replace(
        text,
        parse=lambda fields: text.parse(text_fields(wrapped, fields, text)),
        weights=lambda config: text_weights(wrapped, text.weights(config)),
        per_layer=False,
        both_ways=None,
    )


def text_fields(wrapped: Wrapped, fields: ConfigReader, architecture: Architecture | None = None) -> ConfigReader:
    """Those of the text model. Embedding and head are tied where either part of the file says so (it depends on the
    version of transformers which one does), but see Wrapped. architecture: the text model's."""
    inner = fields.data.get(TEXT)
    text = fields if inner is None else ConfigReader(inner, f"{fields.where}: {TEXT}")
    if architecture is None or not architecture.per_layer:
        text.refuse(PER_LAYER, {})
    if architecture is not None and architecture.both_ways is not None:
        text.refuse(BOTH_WAYS, False)
    for name in wrapped.unread:
        text.refuse(name)
    said = [part.boolean(TIED, False) for part in (fields, text)]
    tied = any(said if wrapped.tied_inside else said[:1]) or (fields.data.get(TIED) is None and wrapped.tied)
    return ConfigReader({**text.data, TIED: tied}, text.where)


def text_weights(wrapped: Wrapped, text: ParamMapping) -> ParamMapping:
    """With the names that its tensors have here."""
    body, *others = wrapped.bodies

    def source(name: str) -> Source:
        return Renamed(text.source(name), text.prefix, body)

    return replace(
        text,
        source=source,
        prefix=body,
        embedding=body + text.embedding.removeprefix(text.prefix),
        prefixes=tuple(others),
        head_prefixes=wrapped.heads,
        beside=wrapped.beside,
    )


def _module(wrapped: Wrapped, data: Mapping[str, Any]) -> str:
    inner = data.get(TEXT)
    first = next(iter(wrapped.texts.values()))
    if inner is None and wrapped.flat:
        return first
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"config.json: {TEXT} is {inner!r:.100}: it must be an object, the text model's fields")
    kind = inner.get("model_type")
    module = first if kind is None else wrapped.texts.get(kind) if isinstance(kind, str) else None
    if module is None:
        raise CheckpointError(
            f"config.json: {TEXT}: model_type is {kind!r:.100}: supported with model_type {data.get('model_type')} are "
            f"{', '.join(wrapped.texts)}"
        )
    return module
