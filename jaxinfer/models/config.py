"""Reading config.json: checked fields, and what every model's configuration says to the rest of the program."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self, TypeVar

from jaxinfer.errors import CheckpointError
from jaxinfer.layers.classifier_config import ClassifierConfig
from jaxinfer.layers.rotary import Rope

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"  # in layer_types
LINEAR = "linear_attention"
PER_LAYER = "per_layer_config"  # other fields for single layers
LARGEST = 2**24  # no dimension of a real model comes near; keeps absurd values from becoming absurd allocations
MAX_LAYERS = 1000  # each takes time to build, even without its weights
_LARGEST_NUMBER = 1e15  # nor any other number; float32 must hold what is computed from it, and from what is above 0
_SMALLEST_NUMBER = 1e-15
C = TypeVar("C", bound="ModelConfig")


@dataclass(frozen=True)
class ModelConfig:
    """What the engine needs to know of any model.

    vocab_size: tokens.
    hidden_size: the width of hidden states.
    num_layers: how many blocks there are.
    num_heads, num_kv_heads: query heads, and those that keys and values have.
    head_dim: of each of them.
    max_context: the most positions that it is defined for.
    tie_word_embeddings: the output head is the embedding table.
    experts_per_token: where weights are of experts, how many of them a token takes.
    state_heads: where layers keep states, heads of those, or what those of several kinds can be divided by; 0: none do.
    causal: tokens see only what comes before them.
    classifier: the head that gives a text's classes, where it is wanted.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    tie_word_embeddings: bool
    experts_per_token: int = field(default=0, kw_only=True)
    state_heads: int = field(default=0, kw_only=True)
    causal: bool = field(default=True, kw_only=True)
    classifier: ClassifierConfig | None = field(default=None, kw_only=True)

    @property
    def split_heads(self) -> int:
        """What a mesh's `tensor` axis must divide."""
        return math.gcd(self.num_heads, self.state_heads)

    @property
    def output_size(self) -> int:
        """The width of what heads get."""
        return self.hidden_size

    def extended(self, kind: type[C], **more: Any) -> C:
        """The same in a class with more fields, which `more` has, and any that become others."""
        own = {known.name: getattr(self, known.name) for known in dataclasses.fields(self)}
        return kind(**(own | more))

    def for_length(self, max_model_len: int | None) -> Self:
        """The configuration for sequences of up to so many tokens, where that changes what is computed: see
        `DecoderConfig`. None: for `max_context`."""
        return self


def describe_config(config: ModelConfig) -> dict[str, Any]:
    """Everything of a model that a program depends on, as it comes back from JSON."""
    content = {"class": type(config).__name__, **dataclasses.asdict(config)}
    described: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return described


class ConfigReader:
    """Typed, range-checked access to the fields of config.json; every refusal names field, value and remedy.

    A field that is absent or null takes the default that transformers gives it.
    """

    def __init__(self, data: Mapping[str, Any], where: str = "config.json", file: Mapping[str, Any] | None = None):
        """data: with the defaults that are known by now; file: what the file says, where that is less."""
        self.data = data
        self.where = where
        self._file = data if file is None else file
        self._defaults: dict[str, Any] = {}  # those that were taken so far

    def with_defaults(self, **defaults: Any) -> ConfigReader:
        """The same, where fields that are absent or null have these values."""
        given = {name: value for name, value in self.data.items() if value is not None}
        return ConfigReader({**self.data, **defaults, **given}, self.where, self._file)

    def with_absent(self, **defaults: Any) -> ConfigReader:
        """The same, where fields that are absent have these values: null means something else."""
        return ConfigReader({**defaults, **self.data}, self.where, self._file)

    def with_values(self, **values: Any) -> ConfigReader:
        """The same, where these fields have these values."""
        return ConfigReader({**self.data, **values}, self.where, self._file)

    def error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} is {self.said(name)}: {problem}")

    def said(self, name: str) -> str:
        """What a field has, for errors; where the file says nothing, that, and which default was taken."""
        value = self.data.get(name)
        if self._file.get(name) is not None:
            return f"{value!r:.100}"
        default = self._defaults.get(name) if value is None else value
        known = "" if default is None else f" (by default {default!r:.80})"
        return f"{'null' if name in self._file else 'missing'}{known}"

    def named(self, name: str) -> str:
        """The field with that, where it is the reason for what is wrong with another."""
        return f"{name}, {self.said(name)}"

    def _value(self, name: str, default: Any) -> Any:
        value = self.data.get(name)
        if value is None:
            self._defaults[name] = value = default
        return value

    def integer(self, name: str, default: int | None = None, minimum: int = 1, maximum: int = LARGEST) -> int:
        value = self._value(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(name, f"it must be an integer from {minimum} to {maximum}")
        return value

    def number(self, name: str, default: float | None = None, minimum: float = 0.0, above: bool = True) -> float:
        """A number above `minimum` (or, with above=False, equal to it too)."""
        value = self._value(name, default)
        if value is None:
            raise self.error(name, "it must be a number")
        fine = isinstance(value, int | float) and not isinstance(value, bool) and minimum <= value <= _LARGEST_NUMBER
        if not fine or (above and value == minimum) or 0 < value < _SMALLEST_NUMBER:
            lowest = minimum or _SMALLEST_NUMBER if above else minimum
            least = f"{'above' if above and minimum else 'of at least'} {lowest:g}"
            raise self.error(name, f"it must be a number {least} and at most {_LARGEST_NUMBER:g}")
        return float(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of so many numbers above 0."""
        values = self.data.get(name)
        if not isinstance(values, list) or len(values) != count:
            raise self.error(name, f"it must be a list of {count} numbers")
        items = ConfigReader({f"{name}[{i}]": value for i, value in enumerate(values)}, self.where)
        return tuple(items.number(item) for item in items.data)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "it must be true or false")
        return value

    def choice(self, name: str, default: str, known: Sequence[str]) -> str:
        value = self._value(name, default)
        if value not in known:
            raise self.error(name, f"supported are {', '.join(known)}")
        return str(value)

    def refuse(self, name: str, *allowed: Any) -> None:
        """Refuses any value of a field but the allowed ones (and null)."""
        value = self.data.get(name)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(a) for a in allowed) or "absent"
            raise self.error(name, f"jaxinfer supports only {wanted} here, because the arithmetic would differ")


def rope_of(
    fields: ConfigReader,
    head_dim: int,
    *,
    interleaved: bool = False,
    default_partial: float | None = None,
    layer_type: str | None = None,
) -> tuple[Rope, int]:
    """The rotary embedding and the most positions it is good for. Definitions are those of transformers.

    interleaved: see Rope. default_partial: which share of a head's dimensions turns, where nothing is said; None: it
    is all, and may be nothing else. layer_type: see `rope_parameters`.
    """
    context = fields.integer("max_position_embeddings", 2048)
    rope = rope_parameters(fields, layer_type)
    rope.refuse("mrope_section")
    if default_partial is None:
        rope.refuse("partial_rotary_factor", 1, 1.0)
    share = rope.number("partial_rotary_factor", default_partial or 1.0)
    if share > 1:
        raise rope.error("partial_rotary_factor", "it must be at most 1")
    dim = int(head_dim * share)
    if dim % 2 or not dim:
        origin = "" if fields.data.get("head_dim") is not None else " (hidden_size // num_attention_heads)"
        part = "" if share == 1 else f", of which partial_rotary_factor {share:g} leaves {dim}"
        problem = f"head_dim is {head_dim}{origin}{part}: rotary embeddings need an even number"
        raise CheckpointError(f"{fields.where}: {problem}")
    scaled, context = _scaled_rope(rope, dim, context)
    return replace(scaled, interleaved=interleaved), context


def rope_parameters(fields: ConfigReader, layer_type: str | None = None) -> ConfigReader:
    """What config.json says of rotary embeddings, in both spellings: `rope_parameters` (transformers 5), and
    `rope_theta` with `rope_scaling` (transformers 4, with `type` or `rope_type`).

    layer_type: of which layers, where there may be settings for each type.
    """
    data = fields.data
    parameters: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = data.get(name)
        if part is None:
            continue
        if not isinstance(part, dict):
            raise fields.error(name, "it must be an object or null")
        if any(isinstance(value, dict) for value in part.values()):
            if layer_type is None:
                raise fields.error(
                    name, "settings per layer type are not supported here; it must be one for all layers"
                )
            part = part.get(layer_type)
            if not isinstance(part, dict):
                raise fields.error(name, f"it must have an object for {layer_type}")
        if parameters and part and part != parameters:
            raise fields.error("rope_scaling", "rope_parameters is there too and says otherwise; remove one of them")
        parameters |= part
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if data.get(name) is not None:
            parameters.setdefault(name, data[name])
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    return ConfigReader(parameters, f"{fields.where}: rope_parameters")


def check_typed(fields: ConfigReader, parameters: Mapping[str, Any]) -> None:
    """Refuses what settings of one layer type may not say, as transformers reads it only beside all of them."""
    ConfigReader(parameters, f"{fields.where}: rope_parameters").refuse("truncate", True)


def typed_rope(fields: ConfigReader, layer_type: str, theta: tuple[str, float], head_dim: int) -> tuple[Rope, int]:
    """`rope_of` the layers of a type: `rope_parameters` has an object for each. theta: the field that has theta where
    they are not there, and its default."""
    data = {**fields.data, "rope_theta": fields.number(*theta)}
    parameters = data.get("rope_parameters")
    if isinstance(parameters, Mapping):
        if parameters and not {FULL, SLIDING} & parameters.keys():
            raise fields.error("rope_parameters", f"it must have an object for {FULL}, and one for {SLIDING}")
        data["rope_parameters"] = own = parameters.get(layer_type)
        if isinstance(own, Mapping):
            check_typed(fields, own)
    return rope_of(ConfigReader(data, fields.where), head_dim)


def _scaled_rope(rope: ConfigReader, dim: int, context: int) -> tuple[Rope, int]:
    """The embedding of some dimensions, and how far it reaches if the model is trained for `context`."""
    kind = rope.choice("rope_type", "default", Rope.KINDS)
    theta = rope.number("rope_theta", 10000.0, minimum=1.0)
    if kind == "default":
        return Rope(dim, theta), context
    if kind == "dynamic":
        rope.number("factor")
        return Rope(dim, theta, kind), context
    if kind == "longrope":
        return _longrope(rope, dim, theta, context)
    original = rope.integer("original_max_position_embeddings", context)
    if kind == "yarn" and rope.data.get("factor") is None:
        factor = context / original
    else:
        factor = rope.number("factor")
    if kind == "linear":
        return Rope(dim, theta, kind, factor), _stretched(rope, context * max(factor, 1.0))
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high < low:
            raise rope.error("high_freq_factor", f"it must be at least low_freq_factor, {low:g}")
        return Rope(dim, theta, kind, factor, original, low, high), context
    yarn = Rope(
        dim,
        theta,
        kind,
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
        attention_factor=_yarn_attention_factor(rope, factor),
    )
    return yarn, max(context, _stretched(rope, original * factor))


def _longrope(rope: ConfigReader, dim: int, theta: float, context: int) -> tuple[Rope, int]:
    """With the short factors (arXiv:2402.13753), up to the original context. Beyond it there are others for all
    positions of a sequence, and what is kept of it would have to be computed again: so those are for engines that
    are made for more, always (`ModelConfig.for_length`)."""
    original = rope.integer("original_max_position_embeddings", context, minimum=2)
    factor = rope.number("factor", context / original)
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short = Rope(
        dim,
        theta,
        "longrope",
        short_factors=rope.numbers("short_factor", dim // 2),
        long_factors=rope.numbers("long_factor", dim // 2) if context > original else (),
        long_context=context if context > original else 0,
        attention_factor=rope.number("attention_factor", attention_factor),
    )
    return short, min(context, original)


def _stretched(rope: ConfigReader, context: float) -> int:
    if context > LARGEST:
        raise rope.error("factor", f"a context of {context:.0f} tokens is more than {LARGEST}")
    return int(context)


def _yarn_attention_factor(rope: ConfigReader, factor: float) -> float:
    if rope.data.get("attention_factor") is not None:
        return rope.number("attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    over, under = rope.data.get("mscale"), rope.data.get("mscale_all_dim")
    if over and under:
        return mscale(rope.number("mscale")) / mscale(rope.number("mscale_all_dim"))
    return mscale(1.0)


def sliding_window(fields: ConfigReader) -> int | None:
    """`sliding_window`: null means none; where the field is absent, transformers takes 4096."""
    if fields.data.get("sliding_window", True) is None:
        return None
    return fields.integer("sliding_window", 4096)


def windows_of(fields: ConfigReader, num_layers: int, window: int | None, first: int = 0) -> tuple[int | None, ...]:
    """Each layer's sliding window: by `layer_types` where given, else `window` from layer `first` on."""
    if fields.data.get("layer_types") is None:
        return tuple(window if i >= first else None for i in range(num_layers))
    types = layer_types_of(fields, num_layers)
    if SLIDING in types and window is None:
        problem = "it names sliding_attention but no sliding_window is in use (use_sliding_window)"
        raise fields.error("layer_types", problem)
    return tuple(window if t == SLIDING else None for t in types)


def periodic_windows(fields: ConfigReader, num_layers: int, period: int) -> tuple[int | None, ...]:
    """Each layer's sliding window, of 4096 where the field is absent: by `layer_types` where given, else all layers
    have it but each `period`-th."""
    return typed_windows(fields, layer_types_of(fields, num_layers, lambda i: (i + 1) % period == 0))


def typed_windows(fields: ConfigReader, types: Sequence[str]) -> tuple[int | None, ...]:
    """Each layer's sliding window, of 4096 where the field is absent; null is for models of which no layer slides."""
    if fields.data.get("sliding_window", True) is None:
        if SLIDING in types:
            problem = "some layers have sliding_attention; it must be an integer, or absent"
            raise fields.error("sliding_window", problem)
        return (None,) * len(types)
    window = fields.integer("sliding_window", 4096)
    return tuple(window if t == SLIDING else None for t in types)


def layer_types_of(
    fields: ConfigReader,
    num_layers: int,
    is_full: Callable[[int], bool] = lambda _: True,
    other: str = SLIDING,
    name: str = "layer_types",
    spellings: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, ...]:
    """FULL or other for each layer: by the field `name` where given, else by what `is_full` says of its number.
    spellings: older ones of the kinds."""
    types = fields.data.get(name)
    if types is None:
        return tuple(FULL if is_full(i) else other for i in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        raise fields.error(name, f"it must list one kind for each layer of {fields.named('num_hidden_layers')}")
    types = [spellings.get(t, t) if isinstance(t, str) else t for t in types]
    unknown = sorted({str(t) for t in types} - {FULL, other})
    if unknown:
        raise fields.error(name, f"{', '.join(unknown)} is not supported, only {FULL} and {other}")
    return tuple(types)


def listed_layers(fields: ConfigReader, name: str, num_layers: int) -> list[int] | None:
    """A list of numbers of layers; None where nothing is said."""
    listed = fields.data.get(name)
    if listed is None:
        return None
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < num_layers for i in listed):
        raise fields.error(name, f"it must be a list of layers, from 0 to {num_layers - 1} (num_hidden_layers)")
    return listed
