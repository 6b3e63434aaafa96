"""`CrossEncoder`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxinfer.aliases import ANY, names, takes
from jaxinfer.checkpoint.cross_encoder import DEFAULT_ACTIVATION, scores_by_logits
from jaxinfer.checkpoint.files import read_config
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.errors import UnsupportedError
from jaxinfer.layers.vectors import TORCH_ACTIVATIONS
from jaxinfer.llm import LLM
from jaxinfer.models.registry import task_of
from jaxinfer.models.tasks import GENERATE
from jaxinfer.sentence.face import ASKING, Face, ModelCard, form, listed, options_of
from jaxinfer.tasks.classify import ClassifyTask, activated, softmax
from jaxinfer.tasks.pooling import PoolingTask, TextOptions
from jaxinfer.tasks.template import PairTemplate

PAIRS = "a pair of texts or a list of them"
# Of `rank`, what it had before version 6 of the library, where it has no effect either.
BEFORE = names({"convert_to_numpy convert_to_tensor": "scores are floats", "apply_softmax": "a score is of one class"})
RANKING = dataclasses.replace(
    ASKING, instead={**ASKING.instead, **BEFORE}, fine={**ASKING.fine, **dict.fromkeys(BEFORE, (ANY,))}
)


class CrossEncoder(Face):
    """A model that reads two texts at once, and scores them.

    model_name_or_path: a folder or hub id, of a model with classes, or of a language model, which answers "yes" or
        "no".
    num_labels: must be what the model has: no head is ever made anew.
    max_length: tokens of a pair. activation_fn: of scores, in place of the folder's: a name of a class of torch.nn, one
        of them, or a function of NumPy's arrays. The rest: as for SentenceTransformer.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str],
        num_labels: int | None = None,
        max_length: int | None = None,
        device: str | None = None,
        *,
        activation_fn: Any = None,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_folder: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ):
        ours = options_of(model_kwargs, options)
        activation_fn = ours.pop("activation_fn", activation_fn)
        max_length = ours.pop("max_length", max_length)
        options = {"convert": "classify", "revision": revision, "token": token} | ours
        folder = resolve(model_name_or_path, revision, token, cache=cache_folder)
        by_logits = scores_by_logits(folder) is not None
        makes_text = not by_logits and task_of(read_config(folder)) == GENERATE and "hf_overrides" not in options
        if makes_text:
            options["hf_overrides"] = {"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}
        card = ModelCard(os.fspath(model_name_or_path), revision)
        super().__init__(LLM(folder, **options), card, device, prompts, default_prompt_name)
        if num_labels not in (None, self.num_labels):
            raise ValueError(f"num_labels is {num_labels!r}: {folder} has {self.num_labels}")
        self._task = ClassifyTask(self.loaded)
        self._template = PairTemplate(self.tokenizer, None) if makes_text and self.tokenizer.has_chat_template else None
        if max_length is not None:
            self.max_seq_length = max_length
        said = None if self.loaded.pairs is None else self.loaded.pairs.activation
        usual = said or (DEFAULT_ACTIVATION if self.num_labels == 1 else "Identity")
        self.activation_fn = _activation(usual if activation_fn is None else activation_fn)

    @property
    def num_labels(self) -> int:
        """How many classes there are."""
        return self.loaded.size

    @property
    def max_length(self) -> int:
        """max_seq_length, by its older name."""
        return self.max_seq_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        self.max_seq_length = value

    def _text_options(self, task: PoolingTask[Any], prompt: str | None) -> TextOptions:
        options = super()._text_options(task, prompt)
        return options if self._template is None else dataclasses.replace(options, template=self._template)

    @takes(ASKING)
    def predict(
        self,
        sentences: Iterable[Any],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Any = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | None = None,
    ) -> Any:
        """Scores f32[N] of pairs, of a model of one class, or f32[N, C]; of a single pair one row of it. apply_softmax:
        of several classes, after the activation. sentences: any iterable of pairs. The rest: as for
        `SentenceTransformer.encode`."""
        self._check(batch_size, device)
        pairs, given = listed(sentences, PAIRS, most=2), form(convert_to_numpy, convert_to_tensor)
        single = len(pairs) == 2 and all(isinstance(part, str) for part in pairs)
        pairs = [tuple(listed(pair, "a pair of texts")) for pair in ([pairs] if single else pairs)]
        if not pairs:
            return given(np.array([]))
        activation = self.activation_fn if activation_fn is None else _activation(activation_fn)
        found = self._outputs(self._task, pairs, self._prompt(prompt, prompt_name), False, show_progress_bar)
        scores = activation(np.stack([output.probs for output in found]))
        if self.num_labels == 1:
            scores = scores[:, 0]
        elif apply_softmax:
            scores = softmax(scores)
        scores = given(scores)
        return scores[0] if single else scores

    @takes(RANKING)
    def rank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Any = None,
        device: str | None = None,
    ) -> list[dict[str, Any]]:
        """Documents by their scores, the best first: `corpus_id`, `score`, and with return_documents `text`."""
        if self.num_labels != 1:
            raise UnsupportedError(f"rank: the model has {self.num_labels} classes, and a score is of one: use predict")
        texts = listed(documents, "a list of texts", "documents")
        scores = self.predict(
            [(query, text) for text in texts],
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            activation_fn=activation_fn,
            device=device,
        ).tolist()
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
        shown = (lambda i: {"text": texts[i]}) if return_documents else (lambda _: {})
        return [{"corpus_id": i, "score": scores[i], **shown(i)} for i in order]


def _activation(given: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A name, an object or a class of torch.nn as a function of NumPy's arrays, and other functions as they are."""
    name = given.rpartition(".")[2] if isinstance(given, str) else ""
    if type(given).__module__.startswith("torch.nn") and repr(given) == repr(type(given)()):
        name = type(given).__name__  # with the arguments that it has where none are given
    if name in TORCH_ACTIVATIONS:
        return lambda logits: activated(name, logits)
    if not callable(given) or type(given).__module__.startswith("torch.nn"):
        known = ", ".join(TORCH_ACTIVATIONS)
        raise UnsupportedError.at("activation_fn", f"{given!r:.100}: it is a function of NumPy's arrays, or {known}")
    return lambda logits: np.asarray(given(logits))
