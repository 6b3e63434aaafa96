"""Which architectures load. Data: a new one is a line here and a file beside this one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from flax import nnx
    from jax.typing import DTypeLike

    from jaxinfer.models.causal import CausalLM
    from jaxinfer.models.config import Fields, ModelConfig
    from jaxinfer.models.weights import WeightMap


class Build(Protocol):
    """Makes the module of a configuration; under `nnx.eval_shape` nothing is allocated."""

    def __call__(self, config: Any, *, dtype: DTypeLike, rngs: nnx.Rngs) -> CausalLM: ...


@dataclass(frozen=True)
class Architecture:
    """An architecture: config.json to configuration, configuration to module, module to checkpoint tensors."""

    parse: Callable[[Fields], ModelConfig]
    build: Build
    weights: Callable[[ModelConfig], WeightMap]


class Entry(NamedTuple):
    """A line of the registry: the module that has ARCHITECTURE, the class name on the hub, models of the kind."""

    module: str
    hf_class: str
    known_as: str


REGISTRY: dict[str, Entry] = {
    "gpt2": Entry("jaxinfer.models.gpt2", "GPT2LMHeadModel", "GPT-2, DistilGPT-2"),
    "llama": Entry("jaxinfer.models.llama", "LlamaForCausalLM", "Llama 2, Llama 3.x, TinyLlama, SmolLM"),
    "mistral": Entry("jaxinfer.models.mistral", "MistralForCausalLM", "Mistral 7B, Mistral Nemo"),
    "qwen2": Entry("jaxinfer.models.qwen2", "Qwen2ForCausalLM", "Qwen2, Qwen2.5"),
    "qwen3": Entry("jaxinfer.models.qwen3", "Qwen3ForCausalLM", "Qwen3 (dense)"),
}


def architecture(model_type: str) -> Architecture:
    """The architecture of a `model_type`. Raises ValueError that lists the known ones."""
    entry = REGISTRY.get(model_type)
    if entry is None:
        raise ValueError(f"model_type {model_type!r} is not supported; known are {', '.join(REGISTRY)}")
    found = importlib.import_module(entry.module).ARCHITECTURE
    assert isinstance(found, Architecture)
    return found


def parse_config(data: Mapping[str, Any]) -> tuple[Architecture, ModelConfig]:
    """The architecture and checked configuration of a config.json's content. Raises ValueError naming the field."""
    from jaxinfer.models.config import Fields

    found = architecture(str(data.get("model_type")))
    fields = Fields(data)
    for name in ("is_encoder_decoder", "add_cross_attention"):
        fields.refuse(name, False)
    return found, found.parse(fields)
