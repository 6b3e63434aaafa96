"""`SentenceTransformer`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxinfer.aliases import takes
from jaxinfer.checkpoint.files import read_config
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.sentence import MODULES, SIMILARITIES
from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.llm import LLM
from jaxinfer.models.registry import task_of
from jaxinfer.models.tasks import CLASSIFY, GENERATE
from jaxinfer.sentence.face import ASKING, Face, options_of
from jaxinfer.tasks.embed import EmbedTask, VectorOptions, normalized
from jaxinfer.tasks.similarity import pairwise_similarity, quantized, similarity
from jaxinfer.tasks.tokens import TokenOptions, TokenTask


class SentenceTransformer(Face):
    """A model that makes vectors of texts.

    model_name_or_path: a folder or hub id. Without modules of sentence-transformers it is the mean of a model's hidden
        states, or the last token's of a language model.
    device: the platform that JAX runs on, or nothing: another one is refused.
    model_kwargs, and further options: those of LLM (dtype, quantization, mesh, ...), which come in one batch whatever
        batch_size says. Errors are LLM's.
    similarity_fn_name, truncate_dim, prompts, default_prompt_name: in place of what the folder says.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str],
        *,
        device: str | None = None,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: str | None = None,
        truncate_dim: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ):
        options = {"runner": "pooling", "revision": revision, "token": token} | options_of(model_kwargs, options)
        folder = resolve(model_name_or_path, revision, token)
        if not os.path.lexists(folder / MODULES):
            task = task_of(read_config(folder))
            if task == CLASSIFY:
                raise ValueError(f"{folder}: the model gives texts classes: it is a CrossEncoder")
            usual = {"pooling_type": "LAST" if task == GENERATE else "MEAN", "normalize": False}
            options.setdefault("pooler_config", usual)
        super().__init__(LLM(folder, **options), device, prompts, default_prompt_name)
        sentence = self.loaded.sentence
        if sentence is None:
            raise ValueError(f"{folder}: the model scores pairs of texts: it is a CrossEncoder")
        self._task, self._tokens = EmbedTask(self.loaded), TokenTask(self.loaded)
        self.truncate_dim = sentence.dimensions if truncate_dim is None else truncate_dim
        self.similarity_fn_name = sentence.similarity if similarity_fn_name is None else similarity_fn_name

    @property
    def similarity_fn_name(self) -> str:
        """cosine, dot, euclidean or manhattan; may be set."""
        return self._similarity

    @similarity_fn_name.setter
    def similarity_fn_name(self, value: str) -> None:
        if value not in SIMILARITIES:
            raise ValueError(f"similarity_fn_name is {value!r:.100}: it must be one of {', '.join(SIMILARITIES)}")
        self._similarity = SIMILARITIES[value]

    @property
    def truncate_dim(self) -> int | None:
        """Vectors are cut to so many dimensions, after what the folder does with them; may be set."""
        return self._truncate_dim

    @truncate_dim.setter
    def truncate_dim(self, value: int | None) -> None:
        self._truncate_dim = _dimensions("truncate_dim", value)

    @takes(ASKING)
    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        device: str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Any:
        """Vectors f32[N, D], or of a single text f32[D]; with output_value="token_embeddings" the hidden states of each
        text's tokens, f32[tokens, D], as a list.

        precision: see `quantized`. normalize_embeddings: to length 1, after the cut to truncate_dim. batch_size must be
        a number, and no more: calls are of so many tokens (max_num_batched_tokens), and no vector depends on it.
        """
        self._check(batch_size, convert_to_numpy, device)
        texts, single = ([sentences], True) if isinstance(sentences, str) else (list(sentences), False)
        before = self._prompt(prompt, prompt_name)
        if output_value == "token_embeddings":
            if precision != "float32" or normalize_embeddings:
                raise RequestError.at("output_value", "hidden states are given as they are: leave the rest out")
            found = self._outputs(self._tokens, texts, before, TokenOptions(lambda x: x), show_progress_bar)
            states = [output.data for output in found]
            return states[0] if single else states
        if output_value != "sentence_embedding":
            raise UnsupportedError.at("output_value", f"{output_value!r}: it is sentence_embedding or token_embeddings")
        quantized(np.zeros((2, 8), np.float32), precision)  # what is wrong is said before anything runs
        cut = _dimensions("truncate_dim", self.truncate_dim if truncate_dim is None else truncate_dim)
        if not texts:
            return np.array([])
        options = VectorOptions(None, self.loaded.normalizes)
        found = self._outputs(self._task, texts, before, options, show_progress_bar)
        vectors = np.stack([output.embedding for output in found])[:, :cut]
        vectors = quantized(normalized(vectors) if normalize_embeddings else vectors, precision)
        return vectors[0] if single else vectors

    def encode_query(self, sentences: str | Sequence[str], prompt_name: str | None = None, **options: Any) -> Any:
        """`encode`, with the prompt "query" where there is one and none is given."""
        return self._encode_as(("query",), sentences, prompt_name, options)

    def encode_document(self, sentences: str | Sequence[str], prompt_name: str | None = None, **options: Any) -> Any:
        """`encode`, with the prompt "document", "passage" or "corpus", the first that is there, where none is given."""
        return self._encode_as(("document", "passage", "corpus"), sentences, prompt_name, options)

    def _encode_as(self, known: tuple[str, ...], sentences: Any, name: str | None, options: dict[str, Any]) -> Any:
        if name is None and options.get("prompt") is None:
            name = next((candidate for candidate in known if candidate in self.prompts), None)
        return self.encode(sentences, prompt_name=name, **options)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """f32[A, B] of vectors [A, D] and [B, D]."""
        return similarity(self.similarity_fn_name, embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """f32[N] of vectors [N, D] and [N, D]."""
        return pairwise_similarity(self.similarity_fn_name, embeddings1, embeddings2)

    def get_embedding_dimension(self) -> int:
        """D of what `encode` gives."""
        return self.loaded.size if self.truncate_dim is None else min(self.loaded.size, self.truncate_dim)

    get_sentence_embedding_dimension = get_embedding_dimension

    def get_max_seq_length(self) -> int:
        """max_seq_length."""
        return self.max_seq_length

    @contextlib.contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """truncate_dim is this one in between."""
        before, self.truncate_dim = self.truncate_dim, truncate_dim
        try:
            yield
        finally:
            self.truncate_dim = before

    truncate_sentence_embeddings = truncate_embeddings


def _dimensions(where: str, value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise RequestError.at(where, f"{value!r:.100} must be an integer of at least 1")
    return value
