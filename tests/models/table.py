"""The table of docs/families.md: `python -m tests.models.table > docs/families.md`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from jaxinfer.models.registry import ENCODERS, REGISTRY
from tests.models.families import encoder_mutants, encoders, mutants, variants

HEAD = """# Families, and how they are tested

Each family is compared with transformers in float32, on tiny models whose parameters are all random, at two scales: the
logits of 70 tokens, and the tokens that are chosen greedily. Variants are the configurations that change arithmetic; a
mutant breaks one rule of the family (a window by one, an epsilon, a cap, a multiplier), and has to be off by 1e-2 of
the largest logit at least. The worst difference is of all variants, in shares of the largest logit.

Besides, all fields of each family's configuration class take random legal values: logits are those of transformers, or
the field is refused by name. `python -m tests.models.random_fields` prints how many are refused, and why is said there.

Made by `python -m tests.models.table`.

| model_type | models | variants | mutants | worst difference |
|---|---|---|---|---|
"""

ENCODING = """
## Vectors and classes

Encoders, and what other models are beside making text: their hidden states of whole texts, and the logits of classes,
of texts alone and packed with others. A mutant has to be off by 1e-4 of the largest value at least. This is the models'
arithmetic: what `LLM` makes of it has tests of its own.

| model_type | models | variants | mutants | worst difference |
|---|---|---|---|---|
"""


def encoding() -> list[tuple[str, str, list[str], int]]:
    """The same of each model_type that has variants of which texts are encoded."""
    known = {entry.model_type: entry.known_as for entry in (ENCODERS | REGISTRY).values()}
    names: dict[str, list[str]] = {}
    for name in encoders():
        names.setdefault(max((t for t in known if f"{name}-".startswith(f"{t}-")), key=len), []).append(name)
    of = [mutant.variant for mutant in encoder_mutants().values()]
    return [(t, known[t], own, sum(name in own for name in of)) for t, own in sorted(names.items())]


def families() -> list[tuple[str, str, list[str], int]]:
    """Of each model_type that has variants: how its models are known, its variants, how many mutants."""
    known = {entry.model_type: entry.known_as for entry in REGISTRY.values()}
    rows = []
    for model_type in sorted(known):
        own = [name for name in variants() if name.split("-")[0] == model_type]
        count = sum(mutant.variant in own for mutant in mutants().values())
        if own:
            rows.append((model_type, known[model_type], own, count))
    return rows


def row(model_type: str, known_as: str, names: list[str], count: int, worst: str) -> str:
    """A line of the table."""
    return f"| `{model_type}` | {known_as} | {len(names)} | {count} | {worst} |"


def main() -> None:
    """Prints it."""
    from tests.models import test_encoders
    from tests.models.test_families import SCALES, abstract, error, logits, reference

    root = Path(os.environ.get("JAXINFER_TEST_CHECKPOINTS") or tempfile.mkdtemp())
    print(HEAD, end="")
    for model_type, known_as, names, count in families():
        worst = 0.0
        for name in names:
            found = [reference(root, name, scale) for scale in SCALES]
            model = abstract(found[0])
            worst = max(worst, *(error(logits(model, each), each.logits) for each in found))
        print(row(model_type, known_as, names, count, f"{worst:.1e}"), flush=True)
    print(ENCODING, end="")
    for model_type, known_as, names, count in encoding():
        worst = max(test_encoders.worst_of(root, name) for name in names)
        print(row(model_type, known_as, names, count, f"{worst:.1e}"), flush=True)


if __name__ == "__main__":
    main()
