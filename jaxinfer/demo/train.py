"""Trains a packaged model from nothing: `python -m jaxinfer.demo.train --output DIR`, and for the others `--kind
encoder` and `--kind classifier`.

The same seed gives the same data and the same initial weights. Needs optax (`pip install '.[train]'`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sentencepiece import SentencePieceProcessor

from jaxinfer.attention import ForwardBatch
from jaxinfer.demo import encoders, evaluate
from jaxinfer.demo.families import FAMILIES, Question
from jaxinfer.demo.questions import training_questions
from jaxinfer.demo.tokenizer import BOS_ID, EOS_ID, build_tokenizer, load_tokenizer
from jaxinfer.demo.training import optimize, save
from jaxinfer.models.model import AbstractModel, Params
from jaxinfer.places import check_new, local

STEPS = 12_000
ROWS, ROW_LENGTH = 24, 96  # a step's batch: rows that hold several whole examples each

ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}

TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
GENERATION_CONFIG = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False, "max_new_tokens": 64}

# What precedes the last question is left out: the model was trained on single questions.
# The space: SentencePiece puts one before a prompt of its own accord, but not after the BOS of a template.
CHAT_TEMPLATE = """\
{%- set last = namespace(index=0) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- set last.index = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages[last.index:] -%}
{%- if message['role'] == 'user' -%}
{{- bos_token + ' ' + message['content'] | trim -}}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] | trim + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""


def config(vocab_size: int, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        **architecture,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "dtype": "bfloat16",
    }


def tokenizer_for_families() -> bytes:
    """The serialized tokenizer: it knows the words that the families use."""
    rng = Random("tokenizer")
    sentences = []
    for sample in FAMILIES.values():
        for question in (sample(rng) for _ in range(2000)):
            sentences += [question.text, question.answer]
    return build_tokenizer(sentences)


class TrainingBatch(NamedTuple):
    """Rows of S tokens for a vmapped forward.

    batch: the rows.
    targets: i32[rows, S], the next tokens.
    weights: f32[rows, S], of their losses.
    """

    batch: ForwardBatch
    targets: np.ndarray
    weights: np.ndarray


# Batches ------------------------------------------------------------------------------------------------------------


def batches(tokenizer: SentencePieceProcessor, seed: int) -> Iterator[TrainingBatch]:
    """Endless training batches.

    A row packs whole examples `<s> question answer </s>`; each sees only itself, from position 0 on. Only the answers
    and their ends have weight.
    """
    questions = training_questions(seed)
    waiting: list[tuple[list[int], int]] = []
    constant: dict[str, Any] = {
        "tables": (),
        "distribution": np.full((ROWS, 3), (0, 1, 1), np.int32),
    }
    while True:
        if len(waiting) < 8 * ROWS:
            waiting += _examples(tokenizer, list(itertools.islice(questions, 32 * ROWS)))
        packed = [_pack_row(waiting) for _ in range(ROWS)]
        tokens, positions, row, cu_q_lens, targets, weights = map(np.stack, zip(*packed, strict=True))
        own: dict[str, Any] = {"tokens": tokens, "positions": positions, "segment_ids": row, "cu_q_lens": cu_q_lens}
        own["kv_lens"] = np.diff(cu_q_lens)
        yield TrainingBatch(ForwardBatch(**own, **constant), targets, weights)


def _examples(tokenizer: SentencePieceProcessor, questions: Sequence[Question]) -> list[tuple[list[int], int]]:
    """Tokens of each example and how many of them are given, not answered."""
    # The answer is encoded by itself, so that it starts with a space after whatever ends the question.
    texts = tokenizer.encode([question.text for question in questions])
    answers = tokenizer.encode([question.answer for question in questions])
    return [([BOS_ID, *text, *answer, EOS_ID], 1 + len(text)) for text, answer in zip(texts, answers, strict=True)]


def _pack_row(waiting: list[tuple[list[int], int]]) -> tuple[np.ndarray, ...]:
    """Takes the first examples out of `waiting` that fit in a row: its tokens, positions, examples' numbers and where
    they start, targets, weights."""
    tokens, positions, row, targets = (np.zeros(ROW_LENGTH, np.int32) for _ in range(4))
    starts = np.zeros(ROW_LENGTH + 1, np.int32)
    weights = np.zeros(ROW_LENGTH, np.float32)
    start, index, taken = 0, 0, 0
    while index < len(waiting):
        example, prompt_length = waiting[index]
        count = len(example) - 1  # the last token is only a target
        if start + count > ROW_LENGTH:
            index += 1
            continue
        del waiting[index]
        here = slice(start, start + count)
        tokens[here], targets[here] = example[:-1], example[1:]
        positions[here] = np.arange(count)
        weights[start + prompt_length - 1 : start + count] = 1
        row[here] = taken
        start, taken = start + count, taken + 1
        starts[taken:] = start
    row[start:] = taken
    return tokens, positions, row, starts, targets, weights


# Training -----------------------------------------------------------------------------------------------------------


def train(model: AbstractModel, data: Iterator[TrainingBatch], steps: int, seed: int) -> Params:
    """See `optimize`."""
    import optax

    def loss(params: Params, batch: ForwardBatch, targets: jax.Array, weights: jax.Array) -> jax.Array:
        module = model.bind(params)
        logits = jax.vmap(lambda row: module(row, None)[0])(batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses * weights) / jnp.sum(weights)

    return optimize(model, loss, data, steps, seed)


def make(folder: Path, steps: int, seed: int, architecture: Mapping[str, Any]) -> None:
    """Trains a model from nothing and saves it in the new folder `folder`."""
    serialized = tokenizer_for_families()
    tokenizer = load_tokenizer(serialized)
    settings = config(tokenizer.vocab_size(), architecture)
    model = AbstractModel.from_config(settings, "float32")
    params = train(model, batches(tokenizer, seed), steps, seed)
    files = {
        "tokenizer.model": serialized,
        "chat_template.jinja": CHAT_TEMPLATE,
        "config.json": settings,
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "generation_config.json": GENERATION_CONFIG,
    }
    save(folder, params, files)


# How each is made, its sizes, and its steps.
KINDS = {
    "model": (make, ARCHITECTURE, STEPS),
    "encoder": (encoders.make_encoder, encoders.ENCODER, encoders.ENCODER_STEPS),
    "classifier": (encoders.make_classifier, encoders.CLASSIFIER, encoders.CLASSIFIER_STEPS),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jaxinfer.demo.train", description="Trains a packaged model.")
    parser.add_argument("--output", default="demo-model", help="new folder for the model")
    parser.add_argument("--kind", default="model", choices=KINDS, help="which (default: the one that answers)")
    parser.add_argument("--steps", type=int, help="how many, if not as many as the packaged one took")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        options.output = Path(local(options.output, "--output"))
        check_new(str(options.output), f"--output {options.output}")
    except ValueError as error:
        parser.error(str(error))
    make_it, architecture, steps = KINDS[options.kind]
    steps = steps if options.steps is None else options.steps
    if steps < 1:
        parser.error(f"--steps: {steps} is not a number of steps; give at least 1")
    try:
        import optax  # noqa: F401
    except ImportError:
        parser.error("training needs optax, which is not installed: pip install '.[train]'")
    make_it(options.output, steps, options.seed, architecture)
    print(f"saved in {options.output}", file=sys.stderr)
    evaluate.main(["--model", str(options.output)])


if __name__ == "__main__":
    main()
