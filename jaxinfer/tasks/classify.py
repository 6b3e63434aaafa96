"""Texts, and pairs of texts, to classes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxinfer.engine.outputs import ClassificationOutput, ClassificationRequestOutput
from jaxinfer.engine.pooling.load import LoadedPooling
from jaxinfer.engine.pooling.packing import Row
from jaxinfer.errors import CheckpointError
from jaxinfer.layers.vectors import TORCH_ACTIVATIONS
from jaxinfer.tasks.embed import not_finite
from jaxinfer.tasks.pooling import PoolingTask

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


class ClassifyTask(PoolingTask[ClassificationRequestOutput]):
    """Of a model that classifies. labels: names of its classes, in their order. Raises CheckpointError."""

    pairs = True
    done = "Classified"

    def __init__(self, loaded: LoadedPooling):
        super().__init__(loaded)
        config, where = loaded.config, loaded.folder / "config.json"
        names = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(loaded.size)}
        self.labels = [str(names[str(i)]) for i in range(loaded.size)]
        self.problem = config.get("problem_type")
        if self.problem not in (None, *PROBLEMS):
            known = ", ".join(PROBLEMS)
            raise CheckpointError(f"{where}: problem_type is {self.problem!r:.100}: it must be one of {known}")

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Of logits f32[rows, C]. Source: transformers' text-classification pipeline."""
        if self.problem == "regression":
            return logits
        if self.problem == "multi_label_classification" or self.loaded.size == 1:
            return activated("Sigmoid", logits)
        return softmax(logits)

    def outputs(self, rows: list[Row], values: np.ndarray, options: bool) -> Iterator[ClassificationRequestOutput]:
        """options: probabilities are wanted, and not logits."""
        values = self.probabilities(values) if options else values
        for row, probs in zip(rows, values, strict=True):
            best = int(np.argmax(probs))
            outputs = ClassificationOutput(probs.copy(), self.labels[best], best)
            error = None if np.isfinite(probs).all() else not_finite("output")
            yield ClassificationRequestOutput(row.place, row.ids, row.place, error, outputs=outputs)

    def failure(self, index: int, error: str) -> ClassificationRequestOutput:
        nothing = ClassificationOutput(np.zeros(0, np.float32), "", -1)
        return ClassificationRequestOutput(-1, [], index, error, outputs=nothing)


def activated(name: str, logits: np.ndarray) -> np.ndarray:
    """What a class of torch.nn, a name in TORCH_ACTIVATIONS, makes of them."""
    if name == "Identity":
        return logits
    if name == "Sigmoid":  # the usual one, without the device
        values: np.ndarray = 0.5 + 0.5 * np.tanh(0.5 * logits)
        return values
    return np.asarray(TORCH_ACTIVATIONS[name](logits))  # type: ignore[arg-type]  # JAX takes NumPy's


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of each row."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: np.ndarray = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities
