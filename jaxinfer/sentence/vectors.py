"""`SentenceTransformer`."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
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
from jaxinfer.sampling.ids import is_id
from jaxinfer.sentence.face import ASKING, Face, ModelCard, form, like, listed, options_of
from jaxinfer.tasks.embed import EmbedTask, VectorOptions, normalized
from jaxinfer.tasks.similarity import pairwise_similarity, quantized, similarity
from jaxinfer.tasks.tokens import TokenOptions, TokenTask


class SentenceTransformer(Face):
    """A model that makes vectors of texts.

    model_name_or_path: a folder or hub id. Without modules of sentence-transformers it is the mean of a model's hidden
        states, or the last token's of a language model.
    device: the platform that JAX runs on, or nothing: another one is refused.
    cache_folder: where downloads are kept, in place of huggingface_hub's cache.
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
        cache_folder: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ):
        options = {"runner": "pooling", "revision": revision, "token": token} | options_of(model_kwargs, options)
        folder = resolve(model_name_or_path, revision, token, cache=cache_folder)
        if not os.path.lexists(folder / MODULES):
            task = task_of(read_config(folder))
            if task == CLASSIFY:
                raise ValueError(f"{folder}: the model gives texts classes: it is a CrossEncoder")
            usual = {"pooling_type": "LAST" if task == GENERATE else "MEAN", "normalize": False}
            options.setdefault("pooler_config", usual)
        card = ModelCard(os.fspath(model_name_or_path), revision)
        super().__init__(LLM(folder, **options), card, device, prompts, default_prompt_name)
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
        sentences: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Any:
        """Vectors f32[N, D], or of a single text f32[D]; with output_value="token_embeddings" the hidden states of each
        text's tokens, f32[tokens, D], as a list. sentences: any iterable of texts.

        convert_to_tensor: as torch's tensor; convert_to_numpy=False: as a list of tensors, one a text.
        precision: see `quantized`. normalize_embeddings: to length 1, after the cut to truncate_dim. batch_size must be
        a number, and no more: calls are of so many tokens (max_num_batched_tokens), and no vector depends on it.
        """
        self._check(batch_size, device)
        single = isinstance(sentences, str | Mapping)
        texts, given = [sentences] if single else listed(sentences), form(convert_to_numpy, convert_to_tensor)
        before, precision = self._prompt(prompt, prompt_name), "float32" if precision is None else precision
        if output_value == "token_embeddings":
            if precision != "float32" or normalize_embeddings:
                raise RequestError.at("output_value", "hidden states are given as they are: leave the rest out")
            found = self._outputs(self._tokens, texts, before, TokenOptions(lambda x: x), show_progress_bar)
            each = form(True, convert_to_tensor or not convert_to_numpy)
            states = [each(output.data) for output in found]
            return states[0] if single else states
        if output_value != "sentence_embedding":
            raise UnsupportedError.at("output_value", f"{output_value!r}: it is sentence_embedding or token_embeddings")
        quantized(np.zeros((2, 8), np.float32), precision)  # what is wrong is said before anything runs
        cut = _dimensions("truncate_dim", self.truncate_dim if truncate_dim is None else truncate_dim)
        if not texts:
            return given(np.array([]))
        options = VectorOptions(None, self.loaded.normalizes)
        found = self._outputs(self._task, texts, before, options, show_progress_bar)
        vectors = np.stack([output.embedding for output in found])[:, :cut]
        vectors = given(quantized(normalized(vectors) if normalize_embeddings else vectors, precision))
        return vectors[0] if single else vectors

    def encode_query(self, *args: Any, **options: Any) -> Any:
        """`encode`, with the prompt "query" where there is one and none is given."""
        return self._encode_as(("query",), args, options)

    def encode_document(self, *args: Any, **options: Any) -> Any:
        """`encode`, with the prompt "document", "passage" or "corpus", the first that is there, where none is given."""
        return self._encode_as(("document", "passage", "corpus"), args, options)

    def _encode_as(self, known: tuple[str, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        said = {**inspect.signature(self.encode).bind_partial(*args).arguments, **options}
        twice = len(said) < len(args) + len(options)
        if twice or said.get("prompt_name") is not None or said.get("prompt") is not None:
            return self.encode(*args, **options)
        return self.encode(**said | {"prompt_name": next((name for name in known if name in self.prompts), None)})

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """f32[A, B] of vectors [A, D] and [B, D], or of tensors as one."""
        return like(similarity(self.similarity_fn_name, embeddings1, embeddings2), embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """f32[N] of vectors [N, D] and [N, D], or of tensors as one."""
        return like(pairwise_similarity(self.similarity_fn_name, embeddings1, embeddings2), embeddings1, embeddings2)

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
    if value is not None and (not is_id(value) or value < 1):
        raise RequestError.at(where, f"{value!r:.100} must be an integer of at least 1")
    return None if value is None else int(value)
