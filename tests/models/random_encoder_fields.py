"""The same as random_fields.py of encoders: hidden states and classes are those of transformers, or a field is refused.

`python -m tests.models.random_encoder_fields --cases 10 --write` makes random_encoder_fields.json.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer.attention import ForwardBatch
from jaxinfer.checkpoint.files import read_config
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.registry import ENCODERS
from jaxinfer.models.tasks import CLASSIFY, with_task
from tests.devices import CHEAP
from tests.models.field_draws import draw
from tests.models.field_values import TOKENS, Case
from tests.models.random_fields import Illegal, Result, compared
from tests.models.references import randomize

TABLE = Path(__file__).with_suffix(".json")


@functools.cache
def encoder_families() -> dict[str, type]:
    """Configuration classes by model_type."""
    import transformers

    names = {entry.model_type: name.removesuffix("Model") for name, entry in ENCODERS.items() if name != "NewModel"}
    return {model_type: getattr(transformers, f"{name}Config") for model_type, name in names.items()}


def drawn(case: Case) -> dict[str, Any]:
    """Fields, with room for the tokens, also behind padding, and without those that make it a decoder."""
    fields = draw(case, encoder_families()[case.family])
    fields = {name: value for name, value in fields.items() if name not in ("is_decoder", "add_cross_attention")}
    if "max_position_embeddings" in fields:
        fields["max_position_embeddings"] += 8
    fields["pad_token_id"] = fields.get("pad_token_id") or 0  # defaults are outside of a small vocabulary
    heads = fields.get("num_attention_heads", 1)
    return fields | ({"hidden_size": 24} if fields.get("hidden_size", 0) % heads else {})


def theirs(case: Case, fields: dict[str, Any], folder: Path) -> tuple[list[int], np.ndarray]:
    """Tokens, and their hidden states and classes, one after the other. Raises Illegal."""
    import torch
    import transformers

    try:
        config = encoder_families()[case.family](**json.loads(json.dumps(fields)))
        config._attn_implementation = "eager"
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(case.index)
            model = transformers.AutoModelForSequenceClassification.from_config(config).eval().float()
            randomize(model, *case.pick("scale", ((0.3, 0.2), (0.1, 0.1))))
            tokens = torch.randint(0, config.vocab_size, (1, TOKENS))
            given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            hidden, logits = model.base_model(**given).last_hidden_state[0].numpy(), model(**given).logits[0].numpy()
        values = np.concatenate([hidden.ravel(), logits])
        if not np.isfinite(values).all() or not np.abs(logits).max() > 0:
            raise ValueError("values are not finite, or all zero")
        model.save_pretrained(folder)
    except Exception as error:
        raise Illegal(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from None
    return tokens[0].tolist(), values


def ours(folder: Path, tokens: list[int]) -> np.ndarray:
    """The same of ours. Raises ValueError."""
    with Checkpoint(folder) as checkpoint:
        model = AbstractModel.from_config(with_task(read_config(folder), CLASSIFY), "float32")
        params = load_params(model, checkpoint, jax.devices()[0])

    def compute(params: Any, batch: ForwardBatch) -> tuple[jax.Array, jax.Array]:
        module = model.bind(params)
        hidden = module.encode(batch)
        return hidden, module.classify(hidden, batch)

    batch = ForwardBatch.of_sequences([tokens])
    hidden, logits = jax.jit(compute).lower(params, batch).compile(CHEAP)(params, batch)
    return np.concatenate([np.asarray(hidden).ravel(), np.asarray(logits)[0]])


def run(family: str, index: int) -> Result:
    """One case. What is refused is taken out, until the rest can be compared."""
    case = Case(family, index)
    fields = drawn(case)

    def values(folder: Path) -> tuple[np.ndarray, np.ndarray]:
        tokens, expected = theirs(case, fields, folder)
        return ours(folder, tokens), expected

    return compared(fields, values)


def summary(results: list[Result]) -> dict[str, Any]:
    """What a line of the table has."""
    fields = collections.Counter(name for result in results if not result.discarded for name in result.refused)
    return {
        "cases": len(results),
        "discarded": sum(bool(result.discarded) for result in results),
        "fields": dict(sorted(fields.items())),
    }


def table() -> dict[str, Any]:
    """What is refused, as it was last written."""
    return json.loads(TABLE.read_text())


def main() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10, help="of each family")
    parser.add_argument("--family", nargs="*", help="these alone")
    parser.add_argument("--write", action="store_true", help="the table")
    args = parser.parse_args()
    for family in args.family or encoder_families():
        results = [run(family, index) for index in range(args.cases)]
        found = summary(results)
        print(family, found, f"{max(result.error for result in results):.1e}", flush=True)
        for result in results:
            if result.problem or result.discarded:
                print("  ", result.problem or f"discarded: {result.discarded}", flush=True)
        if args.write:
            TABLE.write_text(
                json.dumps({**(table() if TABLE.exists() else {}), family: found}, indent=1, sort_keys=True) + "\n"
            )


if __name__ == "__main__":
    main()
