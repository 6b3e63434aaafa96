"""How the packaged encoder and the packaged classifier are made: small ModernBERTs (Warner et al., arXiv:2412.13663)
that read the questions of the demo.

Of two questions that ask for the same in other words, the encoder's vectors are near each other; it learns that from
pairs, of which each has to find its other half among those of all (van den Oord et al., arXiv:1807.03748). The
classifier says of which family a question is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxinfer.attention import ForwardBatch
from jaxinfer.demo.families import FAMILIES
from jaxinfer.demo.phrasings import training_pairs
from jaxinfer.demo.questions import carelessly, training_questions
from jaxinfer.demo.training import optimize, save
from jaxinfer.layers.pooling import pool
from jaxinfer.models.model import AbstractModel, Params
from jaxinfer.models.sources import slices, whole
from jaxinfer.models.tasks import CLASSIFY, EMBED, with_task

ENCODER = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
CLASSIFIER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER_STEPS, CLASSIFIER_STEPS = 500, 300
PAIRS, QUESTIONS = 64, 64  # of a step
ROW_LENGTH = 24  # tokens that a question has at most
MAX_LENGTH = 512
TEMPERATURE = 0.05  # of similarities

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": MAX_LENGTH,
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
MODULES = ("Transformer", "Pooling", "Normalize")
_CHARACTERS = "".join(map(chr, range(0x21, 0x7F)))
_QUOTED = re.compile(r'"[^"]*"')


def tokenizer_for_families() -> Tokenizer:
    """WordPiece: the words of the questions whole, and all others, and numbers, letter by letter."""
    rng = Random("tokenizer")
    texts = [FAMILIES[family](rng).text for family in FAMILIES for _ in range(2000)]
    words = {word for text in texts for word in re.findall("[a-z]{2,}", _QUOTED.sub("", text).lower())}
    characters = [c for c in _CHARACTERS if not c.isupper()]
    pieces = [*SPECIAL, *characters, *(f"##{c}" for c in characters if c.isalnum()), *sorted(words)]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    ends = [(token, pieces.index(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    made.add_special_tokens(list(SPECIAL))
    return made


def config(kind: str, vocab_size: int, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config.json. kind: the class in transformers."""
    ids = {f"{name}_token_id": SPECIAL.index(f"[{name.upper()}]") for name in ("pad", "cls", "sep")}
    settings = {
        "architectures": [kind],
        "model_type": "modernbert",
        "vocab_size": vocab_size,
        **architecture,
        "max_position_embeddings": MAX_LENGTH,
        **ids,
        "bos_token_id": ids["cls_token_id"],
        "eos_token_id": ids["sep_token_id"],
        "dtype": "bfloat16",
    }
    if kind.endswith("ForSequenceClassification"):
        settings |= {
            "classifier_pooling": "mean",
            "id2label": {str(i): family for i, family in enumerate(FAMILIES)},
            "label2id": {family: i for i, family in enumerate(FAMILIES)},
            "problem_type": "single_label_classification",
        }
    return settings


def rows(tokenizer: Tokenizer, texts: Sequence[str]) -> ForwardBatch:
    """Texts as rows of ROW_LENGTH tokens, for a vmapped forward."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    count, lengths = len(ids), np.array([len(own) for own in ids], np.int32)
    tokens = np.zeros((count, ROW_LENGTH), np.int32)
    for row, own in zip(tokens, ids, strict=True):
        row[: len(own)] = own
    arrays: dict[str, Any] = {
        "tokens": tokens,
        "positions": np.tile(np.arange(ROW_LENGTH, dtype=np.int32), (count, 1)),
        "segment_ids": np.zeros_like(tokens),
        "cu_q_lens": np.stack([np.zeros_like(lengths), lengths], axis=1),
        "kv_lens": lengths[:, None],
        "distribution": np.tile(np.array([0, 1, 1], np.int32), (count, 1)),
    }
    return ForwardBatch(**arrays, tables=())


# Training -----------------------------------------------------------------------------------------------------------


def make_encoder(folder: Path, steps: int, seed: int, architecture: Mapping[str, Any]) -> None:
    """Trains an encoder from nothing and saves it, as sentence-transformers does, in the new folder `folder`."""

    def data() -> Iterator[tuple[ForwardBatch]]:
        rng = Random(f"words {seed}")
        for pairs in training_pairs(seed, PAIRS):
            texts = [carelessly(half.text, rng) for half in (*(a for a, _ in pairs), *(b for _, b in pairs))]
            yield (rows(tokenizer, texts),)

    def loss(params: Params, batch: ForwardBatch) -> jax.Array:
        module = model.bind(params)
        vectors = jax.vmap(lambda row: pool(module.encode(row), row, ("mean",))[0])(batch)
        vectors /= jnp.linalg.norm(vectors, axis=1, keepdims=True)
        ours, theirs = jnp.split(vectors / TEMPERATURE**0.5, 2)
        scores = jnp.matmul(ours, theirs.T)
        likelihoods = jax.nn.log_softmax(scores, axis=0) + jax.nn.log_softmax(scores, axis=1)
        return -jnp.mean(jnp.diagonal(likelihoods)) / 2

    tokenizer = tokenizer_for_families()
    settings = config("ModernBertModel", tokenizer.get_vocab_size(), architecture)
    model = AbstractModel.from_config(with_task(settings, EMBED), "float32")
    params = optimize(model, loss, data(), steps, seed)
    entries = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(MODULES)
    ]
    pooling = {"word_embedding_dimension": architecture["hidden_size"], "pooling_mode_mean_tokens": True}
    files = {
        "modules.json": entries,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": MAX_LENGTH, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }
    save(folder, _stored(model, params), files | _common(settings, tokenizer))


def make_classifier(folder: Path, steps: int, seed: int, architecture: Mapping[str, Any]) -> None:
    """Trains a classifier from nothing and saves it in the new folder `folder`."""
    labels = {family: i for i, family in enumerate(FAMILIES)}

    def data() -> Iterator[tuple[ForwardBatch, np.ndarray]]:
        questions = training_questions(seed)
        while True:
            asked = list(itertools.islice(questions, QUESTIONS))
            texts = [question.text for question in asked]
            yield rows(tokenizer, texts), np.array([labels[question.family] for question in asked], np.int32)

    def loss(params: Params, batch: ForwardBatch, targets: jax.Array) -> jax.Array:
        module = model.bind(params)
        logits = jax.vmap(lambda row: module.classify(module.encode(row), row)[0])(batch)
        likelihoods = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)
        return -jnp.mean(likelihoods)

    tokenizer = tokenizer_for_families()
    settings = config("ModernBertForSequenceClassification", tokenizer.get_vocab_size(), architecture)
    model = AbstractModel.from_config(with_task(settings, CLASSIFY), "float32")
    params = optimize(model, loss, data(), steps, seed)
    save(folder, _stored(model, params), _common(settings, tokenizer))


def _common(settings: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "config.json": settings,
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": TOKENIZER_CONFIG,
    }


def _stored(model: AbstractModel, params: Params) -> dict[str, np.ndarray[Any, Any]]:
    """As checkpoints have them; names of a body without a head begin with nothing."""
    prefix = "" if model.config.classifier else model.weights.prefix
    stored: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in jax.device_get(params).items():
        source = model.params[name].source
        for tensor, shape in source.tensors(value.shape).items():
            stored.setdefault(tensor.removeprefix(prefix), np.zeros(shape, np.float32))
        for region in source.regions(whole(value.shape)):
            stored[region.tensor.removeprefix(prefix)][slices(region.stored)] = region.turned(value[region.index])
    return stored
