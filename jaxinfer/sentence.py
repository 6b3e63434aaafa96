"""`SentenceTransformer` and `CrossEncoder`: the methods and arguments of their namesakes in sentence-transformers, for
programs that are written for these. What comes back is NumPy's."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from jaxinfer.aliases import Words, names, takes
from jaxinfer.checkpoint.cross_encoder import DEFAULT_ACTIVATION, scores_by_logits
from jaxinfer.checkpoint.files import read_config
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.sentence import MODULES, SIMILARITIES
from jaxinfer.engine.outputs import PoolingRequestOutput
from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.layers.vectors import TORCH_ACTIVATIONS
from jaxinfer.llm import LLM
from jaxinfer.models.registry import task_of
from jaxinfer.models.tasks import CLASSIFY, GENERATE
from jaxinfer.tasks.classify import ClassifyTask, activated, softmax
from jaxinfer.tasks.embed import EmbedTask, VectorOptions, normalized
from jaxinfer.tasks.pooling import PoolingTask, TextOptions, progress
from jaxinfer.tasks.similarity import pairwise_similarity, quantized, similarity
from jaxinfer.tasks.template import PairTemplate
from jaxinfer.tasks.tokens import TokenOptions, TokenTask

NUMPY = "what comes back is NumPy's: torch.from_numpy makes tensors of it"
ONE = "the model runs in this process, on the devices of its mesh"
CONSTRUCTING = Words(
    "argument",
    same={"model_name": "model_name_or_path", "default_activation_function": "activation_fn"}
    | {"max_seq_length": "max_length", "automodel_args": "model_kwargs"},
    instead=names(
        {
            "modules": "a model is a folder, or a hub id",
            "backend": "the backend is JAX",
            "cache_folder": "HF_HUB_CACHE says where downloads are kept",
            "tokenizer_kwargs processor_kwargs tokenizer_args": "tokenizer is another one, max_seq_length its length",
            "config_kwargs config_args": "here it is hf_overrides",
            "model_card_data": "models are not saved here",
            "keep_in_fp32_modules": "dtype is of the model; products are summed in float32",
        }
    ),
    fine={"backend": ("torch", "jax")},  # torch is what it is where nobody says anything
)
ASKING = Words(
    "argument",
    is_request=True,
    same={"inputs": "sentences", "activation_fct": "activation_fn"},
    instead=names(
        {
            "convert_to_tensor": NUMPY,
            "pool chunk_size": ONE,
            "task": "the modules of a Router are not done here",
            "processing_kwargs": "max_seq_length is the length of texts",
            "num_workers": ONE,
        }
    ),
)


class _Face:
    """What the two have in common.

    llm: the model. prompts, default_prompt_name: texts that are put before others, by name.
    """

    made_for: ClassVar[str]

    def __init__(self, llm: LLM, device: str | None, prompts: dict[str, str] | None, default_prompt_name: str | None):
        assert llm.loaded is not None
        self.llm, self.loaded = llm, llm.loaded
        self._check_device(device)
        said = self.loaded.sentence or self.loaded.pairs
        assert said is not None
        self.prompts = {**(said.prompts or {}), **(prompts or {})}
        self.default_prompt_name = said.default_prompt if default_prompt_name is None else default_prompt_name
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise self._no_prompt("default_prompt_name", self.default_prompt_name)
        self._max_seq_length = self.loaded.max_model_len

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text; a longer one loses its end, as in sentence-transformers. May be set, up to what the model
        is defined for."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        longest = self.loaded.longest
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= longest:
            raise ValueError(f"max_seq_length is {value!r}: it must be an integer from 1 to {longest}")
        self._max_seq_length = value

    @property
    def tokenizer(self) -> Any:
        """jaxinfer's own."""
        return self.llm.tokenizer

    @property
    def device(self) -> str:
        """The platform, as "cpu" or "tpu"."""
        return str(self.loaded.engine.programs.devices[0].platform)

    def close(self) -> None:
        """Frees the memory."""
        self.llm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.llm!r}>"

    def _prompt(self, prompt: str | None, name: str | None) -> str | None:
        """A prompt comes before a name, and both before the default."""
        if prompt is not None:
            return prompt
        name = self.default_prompt_name if name is None else name
        if name is None:
            return None
        if name not in self.prompts:
            raise self._no_prompt("prompt_name", name)
        return self.prompts[name]

    def _no_prompt(self, where: str, name: object) -> RequestError:
        there = f"there are {', '.join(self.prompts)}" if self.prompts else "there are none"
        return RequestError.at(where, f"{name!r:.100} is no prompt: {there}")

    def _text_options(self, task: PoolingTask[Any], prompt: str | None) -> TextOptions:
        return dataclasses.replace(task.text_options(prompt), most=self.max_seq_length, truncate=True)

    def _outputs(
        self, task: PoolingTask[Any], texts: list[Any], prompt: str | None, options: Any, shown: Any
    ) -> list[Any]:
        """What the task makes of them. Raises ValueError where it makes none of one."""
        run = task.run(texts, self._text_options(task, prompt), options, "raise")
        outputs: list[PoolingRequestOutput[Any]] = list(progress(run, len(texts), bool(shown), task.done))
        for output in outputs:
            if output.error is not None:
                raise ValueError(f"text {output.index}: {output.error}")
        return [output.outputs for output in outputs]

    def _check(self, batch_size: int, convert_to_numpy: bool, device: Any) -> None:
        """Of arguments that only say what is done anyhow."""
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise RequestError.at("batch_size", f"{batch_size!r:.100} must be an integer of at least 1")
        if convert_to_numpy is not True:
            raise UnsupportedError.at("convert_to_numpy", NUMPY)
        self._check_device(device)

    def _check_device(self, device: Any) -> None:
        if device is not None and str(device).partition(":")[0] != self.device:
            raise UnsupportedError.at(
                "device", f"{device!r:.60}: the model is on {self.device}; JAX_PLATFORMS and mesh say on which devices"
            )


def _options(model_kwargs: dict[str, Any] | None, options: dict[str, Any]) -> dict[str, Any]:
    """Those of LLM, with what is given for transformers' from_pretrained."""
    ours, problems = CONSTRUCTING.read(options, [name for name in options if name not in CONSTRUCTING])
    if problems:
        raise CONSTRUCTING.error(problems, ())
    return {**(model_kwargs or {}), **ours}


class SentenceTransformer(_Face):
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
        options = {"runner": "pooling", "revision": revision, "token": token} | _options(model_kwargs, options)
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


class CrossEncoder(_Face):
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
        model_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ):
        ours = _options(model_kwargs, options)
        activation_fn = ours.pop("activation_fn", activation_fn)
        max_length = ours.pop("max_length", max_length)
        options = {"convert": "classify", "revision": revision, "token": token} | ours
        folder = resolve(model_name_or_path, revision, token)
        by_logits = scores_by_logits(folder) is not None
        makes_text = not by_logits and task_of(read_config(folder)) == GENERATE and "hf_overrides" not in options
        if makes_text:
            options["hf_overrides"] = {"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}
        super().__init__(LLM(folder, **options), device, prompts, default_prompt_name)
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
        sentences: Sequence[Any],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Any = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        device: str | None = None,
    ) -> Any:
        """Scores f32[N] of pairs, of a model of one class, or f32[N, C]; of a single pair one row of it. apply_softmax:
        of several classes, after the activation. batch_size: as for `SentenceTransformer.encode`."""
        self._check(batch_size, convert_to_numpy, device)
        single = len(sentences) == 2 and all(isinstance(part, str) for part in sentences)
        pairs = [tuple(pair) for pair in ([sentences] if single else sentences)]
        if not pairs:
            return np.array([])
        activation = self.activation_fn if activation_fn is None else _activation(activation_fn)
        found = self._outputs(self._task, pairs, self._prompt(prompt, prompt_name), False, show_progress_bar)
        scores = activation(np.stack([output.probs for output in found]))
        if self.num_labels == 1:
            scores = scores[:, 0]
        elif apply_softmax:
            scores = softmax(scores)
        return scores[0] if single else scores

    @takes(ASKING)
    def rank(
        self,
        query: str,
        documents: Sequence[str],
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
        scores = self.predict(
            [(query, document) for document in documents],
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            activation_fn=activation_fn,
            device=device,
        ).tolist()
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
        text = (lambda i: {"text": documents[i]}) if return_documents else (lambda _: {})
        return [{"corpus_id": i, "score": scores[i], **text(i)} for i in order]


def _dimensions(where: str, value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise RequestError.at(where, f"{value!r:.100} must be an integer of at least 1")
    return value


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
