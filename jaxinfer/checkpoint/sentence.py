"""Folders of sentence-transformers: what they say besides a model, checked. Format: its versions up to 6.2.

modules.json lists modules, each with a folder of its own: the transformer, its pooling, and what comes after that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.checkpoint.files import check_folder, read_any_json, read_json, short, some
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.static import unknown_token
from jaxinfer.errors import CheckpointError
from jaxinfer.layers.pooling import POOLINGS
from jaxinfer.layers.vectors import TORCH_ACTIVATIONS, Dense, Normalize, Step, VectorNorm
from jaxinfer.models.config import ConfigReader
from jaxinfer.places import inside

MODULES, SAID = "modules.json", "config_sentence_transformers.json"
MOST_MODULES, MOST_PROMPTS = 32, 1000
# By the name that a transformer was first saved under.
LENGTHS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Versions before 5.4 had a field for each pooling, in this order.
OLD_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
SIMILARITIES = {
    "cosine": "cosine",
    "dot": "dot",
    "dot_product": "dot",
    "euclidean": "euclidean",
    "manhattan": "manhattan",
}
VECTOR = "sentence_embedding"
Json = dict[str, Any]


@dataclass(frozen=True)
class SentenceModel:
    """What a folder says.

    transformer: the folder of the model itself.
    pooling: names in POOLINGS, whose vectors are put together.
    include_prompt: a prompt's tokens take part in them.
    width: of hidden states, where it is said.
    steps: what comes after that, each with its folder.
    prompts: texts that are put before others, by name; default_prompt: the name of the one that is where nothing is
        said.
    similarity: how vectors are compared, one of SIMILARITIES.
    dimensions: vectors are cut to so many; None: they are not.
    max_seq_length: tokens of a text, with special ones; None: what the model can do.
    lower_case: texts are made lower-case first.
    is_table: there is a table of vectors instead of the model (see static.py), and no token around a text.
    dropped: the id of a token that is left out of texts.
    """

    transformer: Path
    pooling: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    width: int | None = None
    steps: tuple[tuple[Step, Path], ...] = ()
    prompts: Mapping[str, str] | None = None
    default_prompt: str | None = None
    similarity: str = "cosine"
    dimensions: int | None = None
    max_seq_length: int | None = None
    lower_case: bool = False
    is_table: bool = False
    dropped: int | None = None

    def output_size(self, hidden_size: int) -> int:
        """The width of vectors, of hidden states of that width. Raises CheckpointError if modules don't fit."""
        if self.width not in (None, hidden_size):
            raise CheckpointError(
                f"{self.transformer}: its hidden states are {hidden_size} wide, and the pooling is of {self.width}"
            )
        size = hidden_size * len(self.pooling)
        for step, folder in self.steps:
            wanted = step.in_features if isinstance(step, Dense) else getattr(step, "features", size)
            if wanted != size:
                raise CheckpointError(f"{folder}: takes vectors of {wanted}, and those before it are of {size}")
            size = step.out_features if isinstance(step, Dense) else size
        return size if self.dimensions is None else min(size, self.dimensions)


def read_sentence_model(folder: str | os.PathLike[str]) -> SentenceModel | None:
    """None of a folder that has no modules. Raises CheckpointError for what can't be done, by name."""
    root = check_folder(folder)
    if not os.path.lexists(root / MODULES):
        return None
    transformer, *others = modules(root)
    _check_kind(transformer, root / MODULES, "Transformer", "StaticEmbedding")
    found: Json = {"transformer": transformer.folder, **said(root)[1]}
    if transformer.kind == "StaticEmbedding":
        found["is_table"] = True
    elif not others or others[0].kind != "Pooling":
        raise CheckpointError(f"{root / MODULES}: the module after the transformer must be a Pooling")
    else:
        found |= lengths(transformer.folder) | _pooling(others.pop(0).folder)
    steps = []
    for module in others:
        _check_kind(module, root / MODULES, *STEPS)
        step = STEPS[module.kind](module.folder)
        steps += [] if step is None else [(step, module.folder)]
    return SentenceModel(**found, steps=tuple(steps))


def module_folders(root: Path) -> list[Path]:
    """Where the modules of a folder are, which may be the folder itself. Raises CheckpointError."""
    return [module.folder for module in modules(root)] if os.path.lexists(root / MODULES) else []


def read_model2vec(folder: Path, config: Mapping[str, Any]) -> SentenceModel:
    """What the config.json of a model2vec folder says that has no modules. Raises CheckpointError."""
    fields = ConfigReader(config, str(folder / "config.json"))
    steps: tuple[tuple[Step, Path], ...] = ((Normalize(), folder),) if fields.boolean("normalize", False) else ()
    unlimited = "max_length" in config and config["max_length"] is None
    length = None if unlimited else fields.integer("max_length", 512)
    return SentenceModel(folder, steps=steps, max_seq_length=length, is_table=True, dropped=unknown_token(folder))


def read_steps(model: SentenceModel) -> list[dict[str, np.ndarray[Any, Any]]]:
    """The weights of each step, float32. Raises CheckpointError for any that are missing, unknown or misshaped."""
    return [_weights(step, folder) if step.shapes else {} for step, folder in model.steps]


def _weights(step: Step, folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    with Checkpoint(folder) as checkpoint:
        there = {name: info.shape for name, info in checkpoint.tensors.items()}
        problems = {
            "missing tensors": step.shapes.keys() - there.keys(),
            "unknown tensors": there.keys() - step.shapes.keys(),
            "wrong shapes": {name for name, shape in step.shapes.items() if there.get(name, shape) != shape},
        }
        found = [f"{label}: {some(sorted(names))}" for label, names in problems.items() if names]
        if found:
            raise CheckpointError(f"{folder}: does not fit its config.json: {'; '.join(found)}")
        return {name: checkpoint.read(name).astype(np.float32) for name in step.shapes}


@dataclass(frozen=True)
class Module:
    """An entry of modules.json. kind: the last part of its class's name, whose first parts have changed over time."""

    kind: str
    folder: Path


def modules(root: Path) -> list[Module]:
    """The entries of modules.json, in their order. Raises CheckpointError."""
    path = root / MODULES
    entries = read_any_json(path)
    if not isinstance(entries, list) or not 0 < len(entries) <= MOST_MODULES:
        raise CheckpointError(f"{path}: it must be a list of 1 to {MOST_MODULES} modules")
    found = []
    for i, entry in enumerate(entries):
        name, where = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(where, str):
            raise CheckpointError(f"{path}: [{i}] is {short(entry)}: it must have a type and a path")
        folder = root if where in ("", ".") else inside(root, where.rstrip("/"), f"{path}: [{i}]: path")
        found.append(Module(name.rpartition(".")[2], folder))
    return found


def _check_kind(module: Module, path: Path, *known: str) -> None:
    if module.kind not in known:
        raise CheckpointError(f"{path}: {short(module.kind)} is not supported here, only {', '.join(known)}")


def _fields(folder: Path, name: str = "config.json") -> ConfigReader:
    path = folder / name
    return ConfigReader(read_json(path) if os.path.lexists(path) else {}, str(path))


def _pooling(folder: Path) -> Json:
    """In both spellings; where no pooling is on, it is the mean."""
    fields = _fields(folder)
    old = [name for name in OLD_POOLINGS if name in fields.data]
    unknown = [name for name in fields.data if name.startswith("pooling_mode_") and name not in OLD_POOLINGS]
    if unknown:
        raise fields.error(unknown[0], f"supported are {', '.join(OLD_POOLINGS)}")
    new = fields.data.get("pooling_mode")
    kinds = [OLD_POOLINGS[name] for name in old if fields.boolean(name, False)] or ["mean"]
    if new is not None:
        kinds = [new] if isinstance(new, str) else new
    fine = isinstance(kinds, list) and 0 < len(kinds) <= len(POOLINGS)
    if not fine or any(not isinstance(kind, str) or kind not in POOLINGS for kind in kinds):
        raise fields.error("pooling_mode", f"it must be one or several of {', '.join(POOLINGS)}")
    names = [name for name in ("embedding_dimension", "word_embedding_dimension") if name in fields.data]
    return {
        "pooling": tuple(kinds),
        "include_prompt": fields.boolean("include_prompt", True),
        "width": fields.integer(names[0]) if names else None,
    }


def _dense(folder: Path) -> Dense:
    fields = _fields(folder)
    for name in ("module_input_name", "module_output_name"):
        fields.refuse(name, VECTOR)
    named = fields.data.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = named.rpartition(".")[2] if isinstance(named, str) and named.startswith("torch.") else None
    if activation not in TORCH_ACTIVATIONS:
        raise fields.error("activation_function", f"supported are torch.nn's {', '.join(TORCH_ACTIVATIONS)}")
    sizes = fields.integer("in_features"), fields.integer("out_features")
    return Dense(*sizes, fields.boolean("bias", True), activation, fields.boolean("use_residual", False))


def _normalize(folder: Path) -> Normalize:
    """Its folder need not be there."""
    fields = _fields(folder)
    for name in ("module_input_name", "module_output_name"):
        fields.refuse(name, VECTOR)
    return Normalize()


# What may come after a pooling, by kind; None: it does nothing once a model is trained.
STEPS: dict[str, Callable[[Path], Step | None]] = {
    "Dense": _dense,
    "LayerNorm": lambda folder: VectorNorm(_fields(folder).integer("dimension")),
    "Normalize": _normalize,
    "Dropout": lambda _: None,
}


def lengths(folder: Path, task: str = "feature-extraction") -> Json:
    """How long a text may be, and what else is said beside a transformer, which is for this task. Raises
    CheckpointError."""
    name = next((name for name in LENGTHS if os.path.lexists(folder / name)), LENGTHS[0])
    fields = _fields(folder, name)
    fields.refuse("transformer_task", task)
    for other in ("query_length", "document_length", "query_expansion"):
        fields.refuse(other)
    modalities = fields.data.get("modality_config")
    text = modalities.get("text") if isinstance(modalities, dict) else None
    if isinstance(text, dict):
        output = "last_hidden_state" if task == "feature-extraction" else "logits"
        ConfigReader(text, f"{fields.where}: modality_config: text").refuse("method_output_name", output)
    length = None if fields.data.get("max_seq_length") is None else fields.integer("max_seq_length")
    found = {"max_seq_length": length, "lower_case": fields.boolean("do_lower_case", False)}
    messages = isinstance(modalities, dict) and "message" in modalities
    if task != "feature-extraction":
        return {**found, "conversation": messages}
    if messages:
        raise fields.error("modality_config", "vectors of texts that a chat template writes are not supported")
    return found


def read_max_length(folder: Path) -> int | None:
    """How long a text may be by tokenizer_config.json, where newer sentence-transformers say it; None: nothing is said.
    Where transformers knows no limit it writes 10**30. Raises CheckpointError."""
    fields = _fields(folder, "tokenizer_config.json")
    said = fields.data.get("model_max_length")
    return None if said is None else fields.integer("model_max_length", maximum=10**31)


def said(root: Path, model_type: str = "SentenceTransformer") -> tuple[ConfigReader, Json]:
    """What is said for all modules together, as it is and checked. Raises CheckpointError."""
    fields = _fields(root, SAID)
    fields.refuse("model_type", model_type)
    prompts = {} if fields.data.get("prompts") is None else fields.data["prompts"]
    fine = isinstance(prompts, dict) and len(prompts) <= MOST_PROMPTS
    if not fine or not all(isinstance(text, str | None) for text in prompts.values()):
        raise fields.error("prompts", f"it must be an object of at most {MOST_PROMPTS} texts")
    default = fields.data.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise fields.error("default_prompt_name", f"it must be one of {some(prompts)}")
    cut = fields.data.get("truncate_dim")
    return fields, {
        "prompts": {name: text for name, text in prompts.items() if text is not None},
        "default_prompt": default,
        "similarity": SIMILARITIES[fields.choice("similarity_fn_name", "cosine", tuple(SIMILARITIES))],
        "dimensions": None if cut is None else fields.integer("truncate_dim"),
    }
