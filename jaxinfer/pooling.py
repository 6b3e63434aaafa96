"""What can be asked of models that make vectors, classes and scores of whole texts: the part of `LLM` for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np

from jaxinfer.engine.feed import OnError
from jaxinfer.engine.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RerankResult,
    ScoringOutput,
    ScoringRequestOutput,
)
from jaxinfer.engine.pooling.load import LoadedPooling
from jaxinfer.engine.prompts import BYTES
from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.models.tasks import CLASSIFY, EMBED, GENERATE
from jaxinfer.tasks.classify import ClassifyTask
from jaxinfer.tasks.embed import EmbedTask, finished
from jaxinfer.tasks.pairs import NO_SCORE, PairTask, paired, ranked
from jaxinfer.tasks.params import PoolingParams
from jaxinfer.tasks.pooling import Pair, PoolingTask, TextOptions, progress
from jaxinfer.tasks.pooling import Text as EmbedText
from jaxinfer.tasks.similarity import pairwise_similarity, similarity
from jaxinfer.tasks.stream import Ask
from jaxinfer.tasks.tokens import TokenOptions, TokensOutput, TokenTask

ClassifyText = EmbedText | Pair
Out = TypeVar("Out", bound=PoolingRequestOutput[Any])
CAN = {
    GENERATE: 'the model generates text (LLM.generate, chat, score); convert="embed" loads it for vectors',
    EMBED: "the model makes vectors of texts (LLM.embed, score, rerank, similarity, encode), and nothing else",
    CLASSIFY: "the model gives texts classes (LLM.classify, encode; of one class score, rerank, reward), and nothing "
    "else",
}
DONE = ("embed", "classify", "token_embed", "token_classify")  # vLLM's names
NO_PARAMS = PoolingParams()


class PoolingMethods:
    """Of an `LLM`. Names are vLLM's.

    task: EMBED, CLASSIFY or GENERATE. loaded: the model, where it does not generate.

    A text is text, a list of token ids, which are all that the model gets, or a dict with `prompt` or
    `prompt_token_ids`; a pair is a tuple of two. What they have in common:

    truncate: of a text that is too long the end is cut off, special tokens stay; of a pair the longer one loses its
        end, or the document where a chat template writes it. truncate_prompt_tokens: to so many tokens, or with -1 to
        max_model_len. Without them such a text raises ValueError.
    pooling_params: the same and more in vLLM's way.
    use_tqdm: a progress bar on stderr.
    on_error: what can't be served raises ValueError, or with "return" its own output says why (`error`).

    Each raises UnsupportedError where the model can't do it, saying what it can.
    """

    task: str
    folder: Any
    loaded: LoadedPooling | None = None

    def embed(
        self,
        prompts: EmbedText | Sequence[EmbedText],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
        truncate_prompt_tokens: int | None = None,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        on_error: OnError = "raise",
    ) -> list[EmbeddingRequestOutput]:
        """The vector of each text; outputs come in input order.

        prompt_name: the name of one of the checkpoint's prompts, which is put before each text; prompt: another one.
        dimensions: vectors are cut to so many, as Matryoshka models are trained for. normalize: to length 1, after the
        cut; None: as the checkpoint says. The rest: see PoolingMethods.
        """
        texts = self._embedding.list_of(prompts)
        params = given(pooling_params, truncate_prompt_tokens, dimensions=dimensions, use_activation=normalize)
        outputs = self._embedded(texts, prompt_name, prompt, truncate, params, on_error)
        return list(progress(outputs, len(texts), use_tqdm, EmbedTask.done))

    def embed_iter(
        self,
        prompts: Iterable[EmbedText],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
        truncate_prompt_tokens: int | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[EmbeddingRequestOutput]:
        """`embed` of texts as they come out of an iterable, in their order. It is read no further ahead than it takes
        to keep the device busy, so the memory does not depend on how many there are."""
        if isinstance(prompts, str | Mapping):
            raise RequestError("prompts is one text: embed_iter takes an iterable of them", "prompts")
        params = given(None, truncate_prompt_tokens, dimensions=dimensions, use_activation=normalize)
        return self._embedded(prompts, prompt_name, prompt, truncate, params, on_error)

    def classify(
        self,
        prompts: ClassifyText | Sequence[ClassifyText],
        *,
        use_activation: bool | None = None,
        truncate: bool = False,
        truncate_prompt_tokens: int | None = None,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        on_error: OnError = "raise",
    ) -> list[ClassificationRequestOutput]:
        """The classes of each text, or pair of texts, `(a, b)`; outputs come in input order.

        use_activation: probabilities, as the checkpoint's `problem_type` says, which is the default; False: logits. The
        rest: see PoolingMethods.
        """
        texts = self._classification.list_of(prompts)
        params = given(pooling_params, truncate_prompt_tokens, use_activation=use_activation)
        ask = self.classifying(params, truncate)
        outputs = ask.task.run(texts, ask.text_options, ask.options, on_error)
        return list(progress(outputs, len(texts), use_tqdm, ask.task.done))

    def _scored(
        self,
        queries: Any,
        documents: Any,
        truncate: bool,
        params: PoolingParams,
        chat_template: str | None,
        shown: bool,
        on_error: OnError,
    ) -> list[ScoringRequestOutput]:
        """See `LLM.score`: by both texts at once, or by the similarity of their vectors."""
        if documents is None:
            raise RequestError.at("documents", "a query is scored with a document: give score(queries, documents)")
        if self.task == CLASSIFY:
            pairs = paired(self._pairs.list_of(queries), self._pairs.list_of(documents))
            ask = self.scoring(params, truncate, chat_template)
            outputs = ask.task.run(pairs, ask.text_options, ask.options, on_error)
            return list(progress(outputs, len(pairs), shown, ask.task.done))
        embedding = self._embedding
        self.scoring(params, truncate, chat_template)
        asked, answers = embedding.list_of(queries), embedding.list_of(documents)
        pairs = paired(list(range(len(asked))), list(range(len(asked), len(asked) + len(answers))))
        embedded = self._embedded([*asked, *answers], None, None, truncate, params, on_error)
        vectors = list(progress(embedded, len(asked) + len(answers), shown, EmbedTask.done))
        return [self.similar(vectors[a], vectors[b], i) for i, (a, b) in enumerate(pairs)]

    def rerank(
        self,
        query: EmbedText,
        documents: Sequence[EmbedText],
        *,
        top_n: int | None = None,
        truncate: bool = False,
        truncate_prompt_tokens: int | None = None,
        pooling_params: PoolingParams | None = None,
        chat_template: str | None = None,
        use_tqdm: bool = True,
    ) -> list[RerankResult]:
        """The documents by how well they answer the query, the best first; top_n: only so many. Scores are those of
        `score`, as are the other arguments."""
        ranked([], [], top_n)  # what is wrong is said before anything runs
        params = given(pooling_params, truncate_prompt_tokens)
        if not isinstance(documents, Iterable) or isinstance(documents, BYTES):
            raise RequestError.at("documents", f"a list of texts is needed, not {type(documents).__name__}")
        listed = [documents] if isinstance(documents, str | Mapping) else list(documents)
        outputs = self._scored([query], listed, truncate, params, chat_template, use_tqdm, "raise") if listed else []
        return ranked(listed, [_fine(output).outputs.score for output in outputs], top_n)

    def similarity(
        self, a: EmbedText | Sequence[EmbedText], b: EmbedText | Sequence[EmbedText], **options: Any
    ) -> np.ndarray:
        """f32[A, B], how near the texts `a` are to the texts `b`, by the checkpoint's similarity function (cosine, dot,
        euclidean or manhattan; distances are negative). options: those of `embed`."""
        embedding = self._embedding
        first, second = embedding.list_of(a), embedding.list_of(b)
        if options.get("on_error") == "return":
            raise RequestError.at("on_error", "a matrix has no place for errors: leave it out")
        outputs = self.embed([*first, *second], **options)
        if not first or not second:
            return np.zeros((len(first), len(second)), np.float32)
        vectors = np.stack([_fine(output).outputs.embedding for output in outputs])
        return similarity(self._similarity, vectors[: len(first)], vectors[len(first) :])

    def reward(
        self,
        prompts: ClassifyText | Sequence[ClassifyText],
        *,
        truncate: bool = False,
        truncate_prompt_tokens: int | None = None,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        on_error: OnError = "raise",
    ) -> list[TokensOutput]:
        """Rewards, `outputs.data`: of models with one class f32[1], as the head has it; of models that judge steps
        f32[steps, 2], the probabilities that a step is wrong and that it is right.

        Steps are the tokens `step_tag_id` of pooling_params or pooler_config; without it all tokens are. use_activation
        of pooling_params says otherwise. The rest: see PoolingMethods.
        """
        loaded = self._classification.loaded
        if not loaded.of_tokens and loaded.size != 1:
            raise UnsupportedError(f"{self.folder}: it has {loaded.size} classes, which LLM.classify gives: no reward")
        params = given(pooling_params, truncate_prompt_tokens)
        if loaded.size == 1 and params.use_activation is None and loaded.pooling.get("use_activation") is None:
            params = params.beside(use_activation=False)
        kind = "token_classify" if loaded.of_tokens else "classify"
        return self._encoded(kind, prompts, truncate, params, use_tqdm, on_error)

    def encode(
        self,
        prompts: ClassifyText | Sequence[ClassifyText],
        pooling_params: PoolingParams | None = None,
        *,
        pooling_task: str | None = None,
        truncate: bool = False,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
        on_error: OnError = "raise",
    ) -> list[TokensOutput]:
        """What the model makes of each text, `outputs.data`.

        pooling_task: "embed", a vector f32[D]; "classify", classes f32[C]; "token_embed", the hidden state of each
        token, f32[tokens, D]; "token_classify", each token's classes, f32[tokens, C]. Default: what the model is for.
        The rest: see PoolingMethods.
        """
        of_tokens = self.loaded is not None and self.loaded.of_tokens
        usual = ("token_" if of_tokens else "") + ("embed" if self.task == EMBED else "classify")
        kind = usual if pooling_task is None else pooling_task
        if kind not in DONE:
            raise RequestError.at("pooling_task", f"{kind!r:.100} is none of {', '.join(DONE)}")
        return self._encoded(kind, prompts, truncate, given(pooling_params, truncate_prompt_tokens), use_tqdm, on_error)

    def _encoded(
        self, kind: str, prompts: Any, truncate: bool, params: PoolingParams, shown: bool, on_error: OnError
    ) -> list[TokensOutput]:
        own: PoolingTask[Any] = self._embedding if kind.endswith("embed") else self._classification
        texts = own.list_of(prompts)
        run = self._runs(kind, params)
        options = self._text_options(own, params, truncate)
        return list(progress(map(_as_data, run(texts, options, on_error)), len(texts), shown, own.done))

    def _runs(
        self, kind: str, params: PoolingParams
    ) -> Callable[[Iterable[Any], TextOptions, OnError], Iterator[PoolingRequestOutput[Any]]]:
        """What gives the outputs of a pooling task."""
        if kind.endswith("embed"):
            embed = self._embedding
            params.only(kind, "dimensions", "use_activation", "truncate_prompt_tokens")
            vectors = embed.options(params.dimensions, params.use_activation)
            task, options = (
                (embed, vectors)
                if kind == "embed"
                else (self._tokens, TokenOptions(partial(finished, options=vectors)))
            )
            return lambda texts, how, on_error: task.run(texts, how, options, on_error)
        classify, asked = self._classification, self._classification.loaded.pooling
        steps = ("step_tag_id", "returned_token_ids") if kind == "token_classify" else ()
        params.only(kind, "use_activation", "truncate_prompt_tokens", *steps)
        activates = self._activates(params)
        if kind == "classify":
            return lambda texts, how, on_error: classify.run(texts, how, activates, on_error)
        tag, columns = (asked.get(n) if getattr(params, n) is None else getattr(params, n) for n in steps)
        if columns is not None and max(columns, default=0) >= classify.loaded.size:
            raise RequestError.at("returned_token_ids", f"{columns}: there are {classify.loaded.size} classes")
        chosen = TokenOptions(classify.probabilities if activates else lambda x: x, tag, columns)
        return lambda texts, how, on_error: self._tokens.run(texts, how, chosen, on_error)

    def take(self, loaded: LoadedPooling) -> None:
        """The model. Raises CheckpointError."""
        self.task, self.folder, self.loaded = loaded.task, loaded.folder, loaded
        assert self._embedding if self.task == EMBED else self._classification

    @cached_property
    def _embedding(self) -> EmbedTask:
        return EmbedTask(self._loaded(EMBED))

    @cached_property
    def _classification(self) -> ClassifyTask:
        return ClassifyTask(self._loaded(CLASSIFY))

    @property
    def labels(self) -> list[str]:
        """Names of the classes, in the order of `probs`. Raises UnsupportedError where the model has none."""
        return self._classification.labels

    @cached_property
    def _pairs(self) -> PairTask:
        return PairTask(self._loaded(CLASSIFY))

    @cached_property
    def _tokens(self) -> TokenTask:
        return TokenTask(self._loaded(EMBED, CLASSIFY))

    def _loaded(self, *tasks: str) -> LoadedPooling:
        if self.task not in tasks:
            raise self._unsupported()
        assert self.loaded is not None
        return self.loaded

    def _unsupported(self) -> UnsupportedError:
        """What the model can do, where something else was asked for."""
        return UnsupportedError(f"{self.folder}: {CAN[self.task]}")

    def _activates(self, params: PoolingParams) -> bool:
        """Whether what heads give becomes probabilities and scores."""
        usual = self._classification.loaded.pooling.get("use_activation")
        return (usual is not False) if params.use_activation is None else params.use_activation

    def _text_options(self, task: PoolingTask[Any], params: PoolingParams, truncate: bool, **more: Any) -> TextOptions:
        return task.text_options(task.prompt(None, None), truncate, params.truncate_prompt_tokens, **more)

    def _embedded(
        self,
        texts: Iterable[EmbedText],
        prompt_name: str | None,
        prompt: str | None,
        truncate: bool,
        params: PoolingParams,
        on_error: OnError,
    ) -> Iterator[EmbeddingRequestOutput]:
        ask = self.embedding(params, truncate, prompt_name, prompt)
        outputs: Iterator[EmbeddingRequestOutput] = ask.task.run(texts, ask.text_options, ask.options, on_error)
        return outputs

    def embedding(
        self, params: PoolingParams, truncate: bool, prompt_name: str | None = None, prompt: str | None = None
    ) -> Ask:
        """What `embed` asks of texts."""
        task = self._embedding
        params.only("embed", "dimensions", "use_activation", "truncate_prompt_tokens")
        before = task.text_options(task.prompt(prompt_name, prompt), truncate, params.truncate_prompt_tokens)
        return Ask(task, before, task.options(params.dimensions, params.use_activation))

    def classifying(self, params: PoolingParams, truncate: bool) -> Ask:
        """What `classify` asks of texts and pairs."""
        task = self._classification
        params.only("classify", "use_activation", "truncate_prompt_tokens")
        return Ask(task, self._text_options(task, params, truncate), self._activates(params))

    def scoring(self, params: PoolingParams, truncate: bool, chat_template: str | None) -> Ask:
        """What `score` asks of pairs, or of each of two texts."""
        params.only("score", "use_activation", "truncate_prompt_tokens")
        if self.task == CLASSIFY:
            options = self._text_options(self._pairs, params, truncate, chat_template=chat_template)
            return Ask(self._pairs, options, self._activates(params))
        if chat_template is not None:
            raise RequestError.at("chat_template", "the model makes vectors of single texts: leave it out")
        if params.use_activation is not None:
            raise RequestError.at("use_activation", "the score is the similarity of two vectors: leave it out")
        return self.embedding(params, truncate)

    @property
    def _similarity(self) -> str:
        sentence = self._embedding.loaded.sentence
        assert sentence is not None
        return sentence.similarity

    def similar(self, a: EmbeddingRequestOutput, b: EmbeddingRequestOutput, index: int = 0) -> ScoringRequestOutput:
        """The score of two vectors."""
        error, ids = a.error or b.error, a.prompt_token_ids + b.prompt_token_ids
        if error is not None:
            return ScoringRequestOutput(-1, ids, index, error, outputs=NO_SCORE)
        score = pairwise_similarity(self._similarity, a.outputs.embedding, b.outputs.embedding)
        return ScoringRequestOutput(index, ids, index, outputs=ScoringOutput(float(score)))


def given(params: PoolingParams | None, truncate_prompt_tokens: int | None, **more: Any) -> PoolingParams:
    """What is given in both ways. Raises RequestError."""
    if not isinstance(params, PoolingParams | None):
        raise RequestError(f"pooling_params is a {type(params).__name__}: it must be PoolingParams", "pooling_params")
    return (params or NO_PARAMS).beside(truncate_prompt_tokens=truncate_prompt_tokens, **more)


def _fine(output: Out) -> Out:
    """Raises ValueError where there is none."""
    if output.error is not None:
        raise ValueError(f"text {output.index}: {output.error}")
    return output


def _as_data(output: PoolingRequestOutput[Any]) -> TokensOutput:
    found = output.outputs
    data = next((getattr(found, name) for name in ("data", "embedding", "probs") if hasattr(found, name)), None)
    assert data is not None
    return TokensOutput(
        output.request_id, output.prompt_token_ids, output.index, output.error, outputs=PoolingOutput(data)
    )
