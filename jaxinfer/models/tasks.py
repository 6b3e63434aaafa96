"""What a model is for: text, or vectors and classes of whole texts, which any body's hidden states make."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxinfer.errors import CheckpointError
from jaxinfer.models.architecture import Architecture

if TYPE_CHECKING:
    from flax import nnx
    from jax.typing import DTypeLike

    from jaxinfer.layers.classifier_config import ClassifierConfig
    from jaxinfer.models.body import Body
    from jaxinfer.models.config import ConfigReader, ModelConfig
    from jaxinfer.models.sources import Source
    from jaxinfer.models.weights import ParamMapping

GENERATE, EMBED, CLASSIFY = "generate", "embed", "classify"
TASK = "jaxinfer_task"  # beside the fields of a config.json, where it is not to generate
HEAD_TOKENS = "jaxinfer_head_tokens"  # ids of tokens whose logits, as a model makes text, are those of classes
DIFFERENCE = "jaxinfer_head_difference"  # of two of them, it is the second's less the first's
BOTH_WAYS = "use_bidirectional_attention"
# What names of classes end with, by what they can be loaded for: without their head, or with it.
OF_STEPS = "ForProcessRewardModel"
CLASSIFIER = ("ForSequenceClassification", OF_STEPS, "ForRewardModel")
BODIES = ("Model", "ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForCausalLM", "ForConditionalGeneration")
ENDINGS = {EMBED: BODIES, CLASSIFY: CLASSIFIER}
MOST_LABELS = 2**16


def with_task(data: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A config.json's content of which the model is made for a task."""
    return {**data, TASK: task}


def with_head_tokens(data: Mapping[str, Any], tokens: list[int], difference: bool) -> dict[str, Any]:
    """A config.json's content of which the classes are the logits of tokens, or of two the difference."""
    named = {name: value for name, value in data.items() if name not in ("id2label", "num_labels")}
    return {**named, HEAD_TOKENS: tokens, DIFFERENCE: difference}


def wanted_task(data: Mapping[str, Any]) -> str:
    """That of a config.json's content, see `with_task`. Raises CheckpointError."""
    task = data.get(TASK, GENERATE)
    if task not in (GENERATE, EMBED, CLASSIFY):
        raise CheckpointError(f"{TASK} is {task!r:.100}: it must be {GENERATE}, {EMBED} or {CLASSIFY}")
    return str(task)


def stem(name: str) -> str:
    """Of a class's name, without what it ends with. Where a model that sees has the name, that of its text model is
    longer."""
    return re.sub(f"(Text)?({'|'.join((*BODIES[::-1], *CLASSIFIER))})$", "", name)


def for_task(architecture: Architecture, task: str) -> Architecture:
    """One that encodes, without its head for words, and with its head for classes where these are wanted."""

    def parse(fields: ConfigReader) -> ModelConfig:
        # Without a head of its own it makes none, and what a file has of one is left aside.
        parsed = architecture.parse(fields)
        config = replace(parsed, tie_word_embeddings=True)
        if architecture.both_ways is not None and fields.boolean(BOTH_WAYS, False):
            config = architecture.both_ways(config)
        if task == CLASSIFY:
            head = _special_head(fields) or architecture.classifier or last_token
            config = replace(config, classifier=head(fields, parsed))
        return config

    def build(config: Any, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Body:
        from jaxinfer.layers.classifier import Classifier

        module = architecture.build(config, dtype=dtype, rngs=rngs)
        if config.classifier is not None:
            module.classifier = Classifier(config.classifier, config.output_size, dtype=dtype, rngs=rngs)
        return module

    build.__module__ = architecture.build.__module__  # whose it is, see Declared
    return replace(architecture, parse=parse, build=build, weights=lambda config: _weights(architecture, config))


def _special_head(fields: ConfigReader) -> Callable[[ConfigReader, ModelConfig], ClassifierConfig] | None:
    """One that any body may have."""
    if fields.data.get(HEAD_TOKENS) is not None:
        return of_tokens
    named = fields.data.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    return rewards if name.endswith(CLASSIFIER[1:]) else None


def _weights(architecture: Architecture, config: ModelConfig) -> ParamMapping:
    from jaxinfer.models.sources import Concat, OneOf, Part, Tensor

    mapping, head = architecture.weights(config), config.classifier

    def source(name: str) -> Source:
        part = re.fullmatch(r"classifier\.(dense|norm|out)(\..+)", name)
        if part is None:
            return mapping.source(name)
        assert head is not None
        if part[1] != "out" or not head.rows:
            return Tensor(getattr(head, part[1]) + part[2])
        tables = (mapping.head, mapping.embedding) if head.tied else (mapping.head,)
        places = [place for table in tables for place in mapping.source(table).spellings()]
        sizes = (1,) * len(head.rows)
        return OneOf(tuple(Concat(tuple(Part(x, i, config.vocab_size) for i in head.rows), sizes) for x in places))

    return replace(mapping, source=source, beside=(*mapping.beside, r"lm_head\..+"))


def of_tokens(fields: ConfigReader, config: ModelConfig) -> ClassifierConfig:
    """Logits of some tokens after the last one: rerankers that are language models answer "yes" or "no"."""
    from jaxinfer.layers.classifier_config import ClassifierConfig

    rows, difference = fields.data[HEAD_TOKENS], fields.data.get(DIFFERENCE) is True
    for i in rows:
        if not 0 <= i < config.vocab_size:
            raise CheckpointError(f"token {i} is to be a class: the model's ids go from 0 to {config.vocab_size - 1}")
    for name, plain in (("logit_scale", 1), ("logit_soft_cap", None)):
        if getattr(config, name, plain) != plain:
            raise CheckpointError(f"{fields.where}: logits of words as classes are not made with a {name}")
    return ClassifierConfig(
        1 if difference else len(rows),
        "lasttoken",
        out_bias=False,
        rows=tuple(rows),
        tied=config.tie_word_embeddings,
        difference=difference,
    )


def rewards(fields: ConfigReader, config: ModelConfig) -> ClassifierConfig:
    """The head of Qwen2.5's reward models, of a text (ForRewardModel) or of its steps, which are right or wrong."""
    labels = 2 if fields.data["architectures"][0].endswith(OF_STEPS) else 1
    head = replace(last_token(fields, config), num_labels=labels, activation="relu", out_bias=True)
    return replace(head, dense="score.0", out="score.2")


def last_token(fields: ConfigReader, config: ModelConfig) -> ClassifierConfig:
    """The head of decoders in transformers: of the last token that is not padding."""
    from jaxinfer.layers.classifier_config import LAST_BUT_PADDING, ClassifierConfig

    padding = fields.data.get("pad_token_id")
    return ClassifierConfig(
        num_labels(fields),
        LAST_BUT_PADDING,
        out="score",
        out_bias=False,
        padding_id=None if padding is None else fields.integer("pad_token_id", minimum=-1),
    )


def of_pooler(dense: str) -> Callable[[ConfigReader, ModelConfig], ClassifierConfig]:
    """The head of BERT and its kin, of the pooler's vector. dense: the name of the pooler's matrix."""

    def head(fields: ConfigReader, config: ModelConfig) -> ClassifierConfig:
        from jaxinfer.layers.classifier_config import ClassifierConfig

        return ClassifierConfig(num_labels(fields), dense=dense)

    return head


def num_labels(fields: ConfigReader) -> int:
    """How many classes there are: what `id2label` names, or `num_labels`, or 2."""
    names = fields.data.get("id2label")
    if names is None:
        return fields.integer("num_labels", 2, maximum=MOST_LABELS)
    if not isinstance(names, Mapping) or {str(i) for i in range(len(names))} != names.keys() or not names:
        raise fields.error("id2label", 'it must name each class by its number, from "0" on')
    return len(names)
