"""Random values of all fields of a family's configuration class: see field_values."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

from tests.models.field_values import (
    ABSENT,
    BESIDES,
    BOOL,
    FIXED,
    FULL,
    GEMMA4,
    NOT_NULL,
    OWN_VALUES,
    SLIDING,
    VALUES,
    Case,
    Values,
)


def options(family: str, field: dataclasses.Field[Any]) -> Values:
    """What it may be. Raises KeyError of one that nobody knows."""
    kinds = typing.get_args(field.type) or (field.type,)
    values = OWN_VALUES.get((family, field.name)) or VALUES.get(field.name, BOOL if bool in kinds else None)
    if values is None:
        raise KeyError(f"{field.name}: {field.type}: say in VALUES what it may be")
    null = type(None) in kinds and family not in NOT_NULL.get(field.name, ())
    return (*values, None) if null and not callable(values) else values


def own_fields(config: type) -> list[dataclasses.Field[Any]]:
    """Those of a class that not all classes have."""
    import transformers

    common = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    return [field for field in dataclasses.fields(config) if field.name not in common]


# What others depend on, and what depends on others.
FIRST, LAST = ("num_attention_heads", "num_hidden_layers", "sliding_window", "use_sliding_window"), "rope_parameters"


def draw(case: Case, config: type) -> dict[str, Any]:
    """Values of the fields of a class."""
    drawn: dict[str, Any] = {}
    fields = {field.name: field for field in own_fields(config)}
    for name in sorted(fields.keys() - {LAST, "text_config", *FIXED}, key=lambda name: (name not in FIRST, name)):
        values = options(case.family, fields[name])
        drawn[name] = values(case, drawn) if callable(values) else case.pick(name, values)
        null = callable(values) and type(None) in typing.get_args(fields[name].type)
        if null and case.pick(f"{name} is null", (1, 0, 0, 0)) and drawn.get("sliding_window", ABSENT) is not None:
            drawn[name] = None
    drawn |= {name: case.pick(name, VALUES[name]) for name in BESIDES.get(case.family, ())}  # type: ignore[arg-type]
    given = {name: value for name, value in drawn.items() if value is not ABSENT}
    if LAST in fields and (case.pick(LAST, (True, True, True, True, False)) or case.family in SECTIONS):
        given[LAST] = _ropes(case, config, given)
    return given


SECTIONS = ("qwen2_vl", "qwen2_5_vl")  # their rotary embeddings have sections, and there is no default for small heads
KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")
OWN_KINDS = {"phi3": ("default", "longrope", "su", "yarn"), "phimoe": ("default", "longrope")}


def _ropes(case: Case, config: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings; transformers says in what form: by layer types, or one."""
    try:
        known = config(**fields)
    except Exception:  # it will be discarded
        return {}
    default = known.rope_parameters
    if case.family in GEMMA4:
        sizes = {kind: known.per_layer_config[kind].head_dim for kind in known.layer_types}
        return {kind: _rope(case, f" {kind}", sizes[kind], default[kind]) for kind in sizes}
    head_dim = getattr(known, "head_dim", None) or fields["hidden_size"] // fields["num_attention_heads"]
    if SLIDING in default:
        return {kind: _rope(case, f" {kind}", head_dim, default[kind]) for kind in (SLIDING, FULL)}
    return _rope(case, "", head_dim, default)


def _rope(case: Case, suffix: str, head_dim: int, default: dict[str, Any]) -> dict[str, Any]:
    def pick(name: str, *values: Any) -> Any:
        return case.pick(name + suffix, values)

    kind = said = pick("rope_type", *OWN_KINDS.get(case.family, KINDS))
    if case.family in OWN_KINDS and kind != "default":
        kind = "longrope"
    gemma4 = case.family in GEMMA4  # it has no default of theta, and no other kind that leaves a part of a head
    thetas = (100.0, 10000.0, 5e5) if gemma4 else (ABSENT, 100.0, 10000.0, 5e5)
    rope: dict[str, Any] = {"rope_type": said, "rope_theta": pick("rope_theta", *thetas)}
    if kind == "proportional" or ("partial_rotary_factor" in default and not gemma4):
        rope["partial_rotary_factor"] = pick("partial_rotary_factor", ABSENT, 0.5, 1.0, 0.75)
    if kind not in ("default", "longrope"):
        rope["factor"] = pick("factor", 1.0, 4.0, 2)
    if kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = pick("original", 32, 64)
    if kind == "yarn":
        rope["attention_factor"] = pick("attention_factor", ABSENT, 0.7)
        rope["beta_fast"], rope["beta_slow"] = pick("beta_fast", ABSENT, 16, 4.0), pick("beta_slow", ABSENT, 2)
        rope["mscale"], rope["mscale_all_dim"] = pick("mscale", ABSENT, 0.7, 0.0), pick("mscale_all_dim", ABSENT, 0.4)
        rope["truncate"] = pick("truncate", ABSENT, False, True)
    if kind == "llama3":
        rope["low_freq_factor"], rope["high_freq_factor"] = pick("low", 1.0, 0.5), pick("high", 4.0, 2)
    if kind == "longrope":
        share = rope.get("partial_rotary_factor", ABSENT)
        share = default.get("partial_rotary_factor", 1.0) if share is ABSENT else share
        dim = int(head_dim * share)
        for name in ("short_factor", "long_factor"):
            rng = case.rng(name + suffix)
            rope[name] = [round(rng.uniform(1, 3), 2) for _ in range(dim // 2)]
        rope["attention_factor"], rope["factor"] = pick("attention_factor", ABSENT, 1.3), pick("factor", ABSENT, 4.0)
    if kind == "longrope" and case.family == "phimoe":
        rope["short_mscale"], rope["long_mscale"] = pick("short_mscale", 1.0, 1.3), pick("long_mscale", 0.8, 1.2)
    if "llama_4_scaling_beta" in default:
        rope["llama_4_scaling_beta"] = pick("beta", 0.1, 0.0, 2.0)
        if kind != "longrope":  # whose factors go by the context that was asked for, see ModelConfig.for_length
            rope["original_max_position_embeddings"] = pick("original", 4, 32)
    if case.family in SECTIONS:
        half = head_dim // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return {name: value for name, value in rope.items() if value is not ABSENT}


@functools.cache
def families() -> dict[str, tuple[type, type | None]]:
    """By model_type, the class, and that of the text model inside."""
    from transformers import CONFIG_MAPPING

    from jaxinfer.models.registry import model_types

    found = {}
    for family in model_types():
        config = CONFIG_MAPPING[family]
        inside = config.sub_configs_defaults.get("text_config")
        text = None if inside is None else CONFIG_MAPPING[inside.model_type or f"{family}_text"]
        found[family] = (config, text)
    return found


def text_class(family: str) -> type:
    """The class that says what the text model is."""
    outer, inside = families()[family]
    return inside or outer
