"""Random legal values of every field of each family: logits are those of transformers, or the field is refused by name.

`python -m tests.models.random_fields --cases 2000` prints which share of the cases is refused by family, and which
fields that are; with `--write` this becomes random_fields.json, which no later run may exceed.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxinfer.attention import ForwardBatch
from jaxinfer.checkpoint.files import read_config
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.settle import as_stored
from jaxinfer.models.model import AbstractModel
from tests.devices import CHEAP
from tests.models.families import speaker, variants
from tests.models.field_draws import draw, families, own_fields, text_class
from tests.models.field_values import FIXED, TOKENS, Case
from tests.models.references import randomize

TOLERANCE = 1e-4  # of the largest logit
TABLE = Path(__file__).with_suffix(".json")
# Why fields are refused: no other may be.
EPSILON = "0: a hidden state of zeros, as padding may have, would be no number"
ACTIVATION = "prelu and xielu have parameters of their own"
REASONS = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), EPSILON),
    **dict.fromkeys(("norm_eps", "mixer_rms_eps"), EPSILON),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), ACTIVATION),
    **dict.fromkeys(("mlp_hidden_act", "mamba_hidden_act"), ACTIVATION),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), "transformers repeats them for heads that they don't divide, too"),
    "rope_type": "proportional is Gemma 4's",
    "partial_rotary_factor": "beside proportional",
    "truncate": "of one layer type, which transformers doesn't read",
    "use_bidirectional_attention": "tokens would see what comes: an encoder",
    "sliding_window": "0, which Gemma 3 writes for 1 where tokens see what comes",
    **dict.fromkeys(("head_dim", "short_factor"), "an odd number of dimensions would turn"),
    "attn_logit_softcapping": "Gemma 3 in transformers has the field, and computes without",
    "final_logit_softcapping": "likewise, inside of the model that sees",
    "add_cross_attention": "there is no encoder",
    "tie_word_embeddings": "Phi's head has a bias, and the embedding has none",
    "use_bias": "the same of ERNIE with experts",
    "lm_head_bias": "the same of Phi with experts",
    "num_experts_per_tok": "Phi with experts: transformers takes two, whatever it says",
}
# Of which fields one value alone is honoured: the others are refused, see above.
FEW = {
    ("gemma3", "attn_logit_softcapping"),
    ("gemma3", "final_logit_softcapping"),
    ("gemma3_text", "attn_logit_softcapping"),
    ("gpt2", "add_cross_attention"),
    ("phi", "tie_word_embeddings"),
    ("phimoe", "num_experts_per_tok"),
}


@dataclass
class Result:
    """Of a case.

    discarded: what transformers can't do, or nothing.
    refused: fields, and the values that they had.
    honoured: the fields that were compared, likewise.
    problem: what is a bug, or nothing.
    compared: there was something to compare.
    error: how far logits are apart, in shares of the largest.
    """

    discarded: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    honoured: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    compared: bool = False
    error: float = 0.0


class Illegal(Exception):
    """Transformers can't."""


def wrapped_fields(family: str, case: Case, text: dict[str, Any]) -> dict[str, Any]:
    """Of a model that holds a text model: its tower is that of the family's first variant."""
    outer, inner = families()[family]
    assert inner is not None
    fixed = {name: value for name, value in variants()[family].fields.items() if name in FIXED}
    inside = {"model_type": inner.model_type, **text}
    return draw(case, outer) | fixed | {"text_config": inside}


def theirs(case: Case, fields: dict[str, Any], folder: Path) -> tuple[list[int], np.ndarray]:
    """Makes transformers' model, saves it, and gives tokens and their logits. Raises Illegal."""
    import torch
    import transformers

    outer, inner = families()[case.family]
    auto = transformers.AutoModelForCausalLM if inner is None else transformers.AutoModelForImageTextToText
    try:
        config = outer(**json.loads(json.dumps(fields)))
        text = config.get_text_config()
        config._attn_implementation = text._attn_implementation = "eager"
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(case.index)
            model = auto.from_config(config).eval().float()
            randomize(model, *case.pick("scale", ((0.3, 0.2), (0.1, 0.1))))
            tokens = torch.randint(0, text.vocab_size, (1, TOKENS))
            logits = speaker(model)(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0].numpy()
        if not np.isfinite(logits).all() or not np.abs(logits).max() > 0:
            raise ValueError("logits are not finite, or all zero")
        model.generation_config = transformers.GenerationConfig()
        model.save_pretrained(folder)
    except Exception as error:
        raise Illegal(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from None
    if case.pick("spelling", ("written", "given")) == "given":
        written = json.loads((folder / "config.json").read_text())
        said = {name: written[name] for name in ("model_type", "architectures")}
        (folder / "config.json").write_text(json.dumps(said | fields))
    return tokens[0].tolist(), logits


def ours(folder: Path, tokens: list[int]) -> np.ndarray:
    """Our logits. Raises ValueError."""
    with Checkpoint(folder) as checkpoint:
        model = AbstractModel.from_config(as_stored(read_config(folder), checkpoint), "float32")
        params = load_params(model, checkpoint, jax.devices()[0])
    program = jax.jit(lambda params, batch: model.bind(params)(batch, None)[0])
    batch = ForwardBatch.of_sequences([tokens])
    return np.asarray(program.lower(params, batch).compile(CHEAP)(params, batch))


def refused_field(error: ValueError, fields: dict[str, Any]) -> tuple[str, str] | None:
    """The field that was given and that the error names; within rope_parameters, that one, and which."""
    named = re.match(r"config\.json: (?:text_config: )?(rope_parameters: )?(\w+)(?:\[\d+\])? is ", str(error))
    if named is None:
        return None
    inside, name = named.groups()
    return ("rope_parameters", name) if inside else (name, name)


def run(family: str, index: int) -> Result:
    """One case. What is refused is taken out, until the rest can be compared."""
    case = Case(family, index)
    fields = draw(case, text_class(family))

    def values(folder: Path) -> tuple[np.ndarray, np.ndarray]:
        whole = fields if families()[family][1] is None else wrapped_fields(family, case, fields)
        tokens, expected = theirs(case, whole, folder)
        return ours(folder, tokens), expected

    result = compared(fields, values, {"head_dim": "from hidden_size"})
    if result.compared:
        result.honoured = {f.name: repr(fields.get(f.name, f.default)) for f in own_fields(text_class(family))}
    return result


def compared(
    fields: dict[str, Any],
    values: Callable[[Path], tuple[np.ndarray, np.ndarray]],
    derived: Mapping[str, str] = MappingProxyType({}),
) -> Result:
    """What comes of a case. values: ours and theirs, of a model in this folder that has the fields, out of which those
    are taken that are refused; it raises Illegal, and ValueError for such. derived: fields that follow from others, and
    may be refused where they are not given."""
    result = Result()
    while True:
        folder = Path(tempfile.mkdtemp(prefix="fields-"))
        try:
            found, expected = values(folder)
        except Illegal as error:
            result.discarded = str(error)
            return result
        except ValueError as error:
            named = refused_field(error, fields)
            if named is not None and named[0] == named[1] in derived and named[0] not in fields:
                result.refused[named[0]] = derived[named[0]]
                return result
            if named is None or named[0] not in fields:
                result.problem = f"{error} with {fields}"
                return result
            outside, name = named
            value = fields.pop(outside)
            result.refused[name] = repr(value.get(name) if isinstance(value, dict) and name != outside else value)
            continue
        finally:
            shutil.rmtree(folder)
        result.compared = True
        result.error = float(np.abs(found - expected).max() / np.abs(expected).max())
        if not result.error <= TOLERANCE:
            result.problem = f"values are apart by {result.error:.2g} with {fields}"
        return result


@dataclass
class Share:
    """What came of a family's cases.

    cases: how many there were. discarded: those that transformers can't do.
    refused: in how many a field was refused. fields: which ones, and how often.
    few: fields that were not compared with two values.
    problems: what is wrong.
    """

    cases: int
    discarded: int = 0
    refused: int = 0
    fields: dict[str, int] = field(default_factory=dict)
    few: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of what transformers can do, what is refused."""
        return self.refused / max(self.cases - self.discarded, 1)


def share(family: str, results: list[Result]) -> Share:
    """Of a family's results."""
    found = Share(len(results), sum(bool(result.discarded) for result in results))
    fields: collections.Counter[str] = collections.Counter()
    honoured: dict[str, set[str]] = {f.name: set() for f in own_fields(text_class(family)) if f.name not in FIXED}
    for result in results:
        found.refused += bool(result.refused and not result.discarded)
        fields.update(result.refused.keys() if not result.discarded else ())
        found.problems += [result.problem] if result.problem else []
        found.problems += [
            f"{name} is refused: REASONS don't say why" for name in result.refused.keys() - REASONS.keys()
        ]
        for name, value in result.honoured.items():
            honoured[name].add(value)
    found.fields = dict(sorted(fields.items()))
    found.few = [name for name, values in honoured.items() if len(values) < 2 and (family, name) not in FEW]
    return found


def table() -> dict[str, Any]:
    """What is refused, of how many cases, as it was last written."""
    return json.loads(TABLE.read_text())


def main() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)  # they would wait for each other by spinning
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="of all families together")
    parser.add_argument("--family", nargs="*", help="these alone")
    parser.add_argument("--write", action="store_true", help="the table")
    parser.add_argument("--verbose", action="store_true", help="what came of each case")
    args = parser.parse_args()
    names = args.family or list(families())
    each = -(-args.cases // len(names))
    print("| family | cases | discarded | refused | share | fields |\n|---|---|---|---|---|---|")
    for family in names:
        results = [run(family, index) for index in range(each)]
        found = share(family, results)
        said = ", ".join(f"{name} {count}" for name, count in found.fields.items())
        row = f"{found.cases} | {found.discarded} | {found.refused} | {found.share:.1%} | {said}"
        print(f"| {family} | {row} |", flush=True)
        if args.verbose:
            for index, result in enumerate(results):
                print(f"  {index} {result.discarded} {result.refused} {result.error:.1e}")
        for line in (*found.problems, *(f"{name} has less than two values" for name in found.few)):
            print(f"  {line:.2000}", flush=True)
        if args.write:
            written = table() if TABLE.exists() else {}
            written[family] = {name: getattr(found, name) for name in ("cases", "discarded", "refused", "fields")}
            TABLE.write_text(json.dumps(dict(sorted(written.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
