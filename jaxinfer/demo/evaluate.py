"""Asks a model held-out questions and counts right answers: `python -m jaxinfer.demo.evaluate`.

Of a model that makes vectors, a question is right whose nearest one asks for the same in other words; of one that
classifies, that is given its family.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from jaxinfer.demo import MODEL_DIR
from jaxinfer.demo.families import Question
from jaxinfer.demo.phrasings import held_out_pairs
from jaxinfer.demo.questions import held_out_questions
from jaxinfer.engine.config import KVCacheDType
from jaxinfer.models.tasks import CLASSIFY, EMBED
from jaxinfer.quantization.schemes import SCHEMES, check_quantization

MAX_ANSWER_TOKENS = 48


def ask(llm: Any, questions: Sequence[Question], use_tqdm: bool = True) -> list[bool]:
    """Whether each greedy answer of `llm`, a `jaxinfer.LLM`, is exactly the right one. One with an adapter is
    asked with that."""
    from jaxinfer import SamplingParams

    prompts = [question.text for question in questions]
    params, adapter = (
        SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS),
        next(iter(llm.list_adapters()), None),
    )
    outputs = llm.generate(prompts, params, adapter=adapter, use_tqdm=use_tqdm)
    answers = [output.outputs[0].text.strip() for output in outputs]
    return [answer == question.answer for answer, question in zip(answers, questions, strict=True)]


def nearest(llm: Any, pairs: Sequence[tuple[Question, Question]]) -> list[bool]:
    """Whether the first question of each pair has its second nearest to it, of all second ones, by the vectors of
    `llm`."""
    ours, theirs = (
        np.stack([output.outputs.embedding for output in llm.embed([half.text for half in side], use_tqdm=False)])
        for side in zip(*pairs, strict=True)
    )
    return [bool(best == place) for place, best in enumerate(np.argmax(ours @ theirs.T, axis=1))]


def classify(llm: Any, questions: Sequence[Question]) -> list[bool]:
    """Whether `llm` gives each question the class that is its family's name."""
    outputs = llm.classify([question.text for question in questions], use_tqdm=False)
    return [output.outputs.label == question.family for output, question in zip(outputs, questions, strict=True)]


def answered(llm: Any, count: int, seed: int, use_tqdm: bool = True) -> tuple[Sequence[Question], list[bool]]:
    """Held-out questions of a kind that `llm` can do, and which of them it gets right. Raises ValueError."""
    if llm.task == EMBED:
        pairs = held_out_pairs(count, seed)
        return [first for first, _ in pairs], nearest(llm, pairs)
    questions = held_out_questions(count, seed)
    return questions, classify(llm, questions) if llm.task == CLASSIFY else ask(llm, questions, use_tqdm)


def exact_match(questions: Sequence[Question], right: Sequence[bool]) -> dict[str, float]:
    """The share of right answers: of each family, and `overall`."""
    by_family: dict[str, list[bool]] = defaultdict(list)
    for question, is_right in zip(questions, right, strict=True):
        by_family[question.family].append(is_right)
    shares = {family: sum(results) / len(results) for family, results in by_family.items()}
    return {**shares, "overall": sum(right) / len(right)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jaxinfer.demo.evaluate", description=__doc__)
    parser.add_argument("--model", default=str(MODEL_DIR), help="folder or hub id (default: the packaged model)")
    parser.add_argument("--quantization", help=f"{', '.join(SCHEMES)}; without it, the weights as they are")
    dtypes = get_args(KVCacheDType)
    parser.add_argument("--kv-cache-dtype", default="auto", choices=dtypes, help="auto, as without it: of activations")
    parser.add_argument("--questions", type=int, default=1000, help="how many held-out questions to ask")
    parser.add_argument("--seed", type=int, default=0, help="which of the held-out questions")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        check_quantization(options.quantization)
        held_out_questions(options.questions, options.seed)
    except ValueError as error:
        parser.error(str(error))

    from jaxinfer import LLM

    llm = LLM(options.model, quantization=options.quantization, kv_cache_dtype=options.kv_cache_dtype)
    questions, right = answered(llm, options.questions, options.seed)
    shares = exact_match(questions, right)
    if options.json:
        report = {"model": options.model, "questions": len(questions), "seed": options.seed, "exact_match": shares}
        print(json.dumps(report))
        return
    for name, share in shares.items():
        print(f"{name:<14}{share:8.3f}")


if __name__ == "__main__":
    main()
