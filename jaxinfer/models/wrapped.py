"""Language models inside of models that also see or hear: of such a checkpoint the text model alone is loaded.

Its fields are in config.json's `text_config`, and its tensors have names of their own, beside those of towers and
projectors. These are known by name and never read; a tensor that nobody knows is an error here as elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

TEXT = "text_config"
TIED = "tie_word_embeddings"
# Where transformers 5 has the body in the model, and where it and earlier versions write it.
BODIES = ("model.language_model.", "language_model.model.", "language_model.")


@dataclass(frozen=True)
class Wrapped:
    """What holds a text model.

    texts: the module that has its ARCHITECTURE, by `model_type` in `text_config`; the first where that has none.
    beside: patterns of the tensors that are of other parts, matched in full.
    tied: whether embedding and head are one where nothing is said.
    tied_inside: `text_config` may say so, too; False: what it says is its class's default, and means nothing.
    flat: older config.json files have no `text_config`, and its fields themselves.
    bodies: what the names of its body begin with, here and in other checkpoints.
    heads: what comes before the head's name in others.
    name: what the family is called; "": its model_type.
    tower: what lies beside the text model.
    unread: fields that it computes without in here, and that may say nothing.
    """

    texts: Mapping[str, str]
    beside: tuple[str, ...]
    tied: bool = False
    tied_inside: bool = True
    flat: bool = False
    bodies: tuple[str, ...] = BODIES
    heads: tuple[str, ...] = ("language_model.",)
    name: str = ""
    tower: str = "vision tower"
    unread: tuple[str, ...] = ()


def with_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json's content, and what only its `text_config` says."""
    inner = config.get(TEXT)
    if not isinstance(inner, Mapping):
        return config
    return {**inner, **{name: value for name, value in config.items() if value is not None}}


def lifted(config: dict[str, Any], *names: str) -> dict[str, Any]:
    """A config.json's content with these fields of `text_config` beside it, where only that has them."""
    inner = config.get(TEXT)
    names = tuple(n for n in names if isinstance(inner, Mapping) and inner.get(n) is not None and n not in config)
    if not isinstance(inner, Mapping) or not names:
        return config
    rest = {name: value for name, value in inner.items() if name not in names}
    return config | {name: inner[name] for name in names} | {TEXT: rest}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's content that says that embedding and head are two."""
    inner = config.get(TEXT)
    text = {TEXT: {**inner, TIED: False}} if isinstance(inner, Mapping) else {}
    return {**config, TIED: False, **text}


# What lies beside the text model. Names without "model." are those of transformers 4, and of what it and 5 write.
VISUAL = (r"(model\.)?visual\..+",)
MTP = r"(model\.)?mtp\..+"  # layers that predict more than the next token
LLAVA = (r"(model\.)?(vision_tower|multi_modal_projector)\..+",)

GEMMA3 = Wrapped(
    {"gemma3_text": "jaxinfer.models.gemma3"},
    LLAVA,
    tied=True,
    unread=("final_logit_softcapping",),
    name="Gemma 3",
)
# Gemma 4's towers, and the embeddings that 12B has in their place, by both of its names.
TOWERS = (r"model\.(vision_tower|audio_tower|vision_embedder|embed_vision|embed_audio)\..+",)
GEMMA4 = Wrapped(
    {"gemma4_text": "jaxinfer.models.gemma4"},
    TOWERS,
    tied=True,
    name="Gemma 4",
    tower="part for images and audio",
)
GEMMA4_UNIFIED = replace(GEMMA4, texts={"gemma4_unified_text": "jaxinfer.models.gemma4_unified"})
QWEN2_VL = Wrapped(
    dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_vl", "qwen2_5_vl"), "jaxinfer.models.qwen2_vl"),
    VISUAL,
    flat=True,
    bodies=("model.language_model.", "language_model.", "model."),
    name="Qwen2-VL",
)
QWEN2_5_VL = replace(QWEN2_VL, name="Qwen2.5-VL")
QWEN3_VL = Wrapped(dict.fromkeys(("qwen3_vl_text", "qwen3_vl"), "jaxinfer.models.qwen3_vl"), VISUAL, name="Qwen3-VL")
QWEN3_VL_MOE = Wrapped(
    dict.fromkeys(("qwen3_vl_moe_text", "qwen3_vl_moe"), "jaxinfer.models.qwen3_vl_moe"),
    VISUAL,
    tied_inside=False,
    name="Qwen3-VL",
)
QWEN3_5 = Wrapped(dict.fromkeys(("qwen3_5_text", "qwen3_5"), "jaxinfer.models.qwen3_5"), (*VISUAL, MTP), name="Qwen3.5")
QWEN3_5_MOE = Wrapped(
    dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_moe"), "jaxinfer.models.qwen3_5_moe"), (*VISUAL, MTP), name="Qwen3.5"
)
LLAMA4 = Wrapped(
    {"llama4_text": "jaxinfer.models.llama4"}, (r"(model\.)?(vision_model|multi_modal_projector)\..+",), name="Llama 4"
)
MISTRAL3 = Wrapped(
    {"mistral": "jaxinfer.models.mistral", "ministral3": "jaxinfer.models.ministral3"},
    LLAVA,
    tied=True,
    name="Mistral 3",
)
