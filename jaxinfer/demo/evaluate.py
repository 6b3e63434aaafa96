"""Asks a model held-out questions and counts exact answers: `python -m jaxinfer.demo.evaluate`."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, get_args

from jaxinfer.demo import MODEL_DIR
from jaxinfer.demo.families import Question
from jaxinfer.demo.questions import held_out_questions
from jaxinfer.engine.config import KVCacheDType
from jaxinfer.quantization.schemes import SCHEMES, check_quantization

MAX_ANSWER_TOKENS = 48


def ask(llm: Any, questions: Sequence[Question], use_tqdm: bool = True) -> list[bool]:
    """Whether each greedy answer of `llm`, a `jaxinfer.LLM`, is exactly the right one."""
    from jaxinfer import SamplingParams

    prompts = [question.text for question in questions]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS), use_tqdm=use_tqdm)
    answers = [output.outputs[0].text.strip() for output in outputs]
    return [answer == question.answer for answer, question in zip(answers, questions, strict=True)]


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
        questions = held_out_questions(options.questions, options.seed)
    except ValueError as error:
        parser.error(str(error))

    from jaxinfer import LLM

    llm = LLM(options.model, quantization=options.quantization, kv_cache_dtype=options.kv_cache_dtype)
    shares = exact_match(questions, ask(llm, questions))
    if options.json:
        report = {"model": options.model, "questions": len(questions), "seed": options.seed, "exact_match": shares}
        print(json.dumps(report))
        return
    for name, share in shares.items():
        print(f"{name:<14}{share:8.3f}")


if __name__ == "__main__":
    main()
