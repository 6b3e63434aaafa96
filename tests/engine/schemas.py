"""JSON schemas of all keywords that structured output has, made at random, and what a random model writes by them:

    python -m tests.engine.schemas 5000 MODEL [SEED]

Prints how many texts ended and were valid, how many were cut off, and which schemas were refused for what.
"""

from __future__ import annotations

import collections
import json
import random
import sys
from typing import Any

import jsonschema

from jaxinfer import LLM, RequestError, SamplingParams

FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
PATTERNS = (
    "^[0-9]{3}-[a-z]+$",
    "b",
    "^(yes|no)$",
    r"^\d{1,3}(\.\d{1,2})?$",
    "^[A-Z][a-z]{0,4}$",
    r"[\u00e0-\u00ff]",
    "^.{2,3}$",
)
NAMES = ("id", "name", "größe", "a b", 'q"uote', "__proto__", "tags", "$x", "", "items", "type", "日本")
VALUES = (None, True, False, 0, 1, -2, 1.5, "", "a", 'x"y', "é\n", [], [1, "b"], {}, {"a": [None]}, 1e3)
CLOSING = ('"', "}", "]", '"}', '"]', "}}", "]}", '",', "0", "1")


class Maker:
    """Schemas from a seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def schema(self) -> dict[str, Any]:
        """A whole one, perhaps with definitions that it refers to."""
        r = self.random
        if r.random() < 0.15:
            tree = {
                "type": "object",
                "properties": {"v": self.part(2), "next": {"anyOf": [{"$ref": "#/$defs/t"}, {"type": "null"}]}},
            }
            tree["required"] = ["v", "next"]
            tree["additionalProperties"] = False
            return {
                "$defs": {"t": tree, "u": self.part(2)},
                "type": "object",
                "properties": {"t": {"$ref": "#/$defs/t"}, "u": {"$ref": "#/$defs/u"}},
                "required": ["u"],
            }
        return self.part(0)

    def part(self, depth: int) -> dict[str, Any]:
        r = self.random
        kinds = [self.string, self.number, self.choice, self.plain]
        if depth < 3:
            kinds += [self.object, self.object, self.object, self.array, self.several]
        made = r.choice(kinds)(depth + 1)
        if r.random() < 0.1:
            made = {"title": "T", "description": "d", "default": 1, **made}
        return made

    def plain(self, depth: int) -> dict[str, Any]:
        r = self.random
        return r.choice(
            [{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}, {"type": ["integer", "boolean"]}, {}]
        )

    def string(self, depth: int) -> dict[str, Any]:
        r, made = self.random, {"type": "string"}
        match r.randrange(4):
            case 0:
                made |= {"maxLength": r.randint(1, 8)} | ({"minLength": 1} if r.random() < 0.5 else {})
            case 1:
                made |= {"pattern": r.choice(PATTERNS)}
            case 2:
                made |= {"format": r.choice(FORMATS)}
        return made

    def number(self, depth: int) -> dict[str, Any]:
        r = self.random
        made: dict[str, Any] = {"type": r.choice(["integer", "number"])}
        low = r.choice([-1000, -7, 0, 3, 0.5, 99])
        if r.random() < 0.5:
            made[r.choice(["minimum", "exclusiveMinimum"])] = low
        if r.random() < 0.5:
            made[r.choice(["maximum", "exclusiveMaximum"])] = low + r.choice([2, 10, 1234, 2.5])
        if r.random() < 0.15:
            made["multipleOf"] = r.choice([2, 5, 0.5, 10])
        return made

    def choice(self, depth: int) -> dict[str, Any]:
        r = self.random
        return {"const": r.choice(VALUES)} if r.random() < 0.4 else {"enum": r.sample(VALUES, r.randint(1, 5))}

    def object(self, depth: int) -> dict[str, Any]:
        r, made = self.random, {"type": "object"}
        names = r.sample(NAMES, r.randint(0, 4))
        made["properties"] = {name: self.part(depth) for name in names}
        made["required"] = r.sample(names, r.randint(0, len(names)))
        match r.randrange(5):
            case 0:
                made["additionalProperties"] = self.part(depth + 1)
            case 1:
                made["patternProperties"] = {"^x[0-9]+$": self.part(depth + 1)}
                made["additionalProperties"] = False
            case 2:
                del made["properties"], made["required"]
                made |= {"minProperties": r.randint(0, 1), "maxProperties": r.randint(1, 3)}
            case _:
                made["additionalProperties"] = False
        return made

    def array(self, depth: int) -> dict[str, Any]:
        r, made = self.random, {"type": "array"}
        if r.random() < 0.4:
            made["prefixItems"] = [self.part(depth) for _ in range(r.randint(1, 3))]
            made["items"] = r.choice([False, self.part(depth + 1)])
        else:
            made["items"] = self.part(depth)
        if r.random() < 0.6:
            made |= {"minItems": r.randint(0, 2), "maxItems": r.randint(2, 4)}
        return made

    def several(self, depth: int) -> dict[str, Any]:
        r = self.random
        match r.randrange(3):
            case 0:
                return {"anyOf": [self.part(depth) for _ in range(r.randint(2, 3))]}
            case 1:
                kinds = r.sample(["a", "b", "c"], 2)
                made = [
                    {
                        "type": "object",
                        "properties": {"kind": {"const": k}, "v": self.part(depth)},
                        "required": ["kind", "v"],
                        "additionalProperties": False,
                    }
                    for k in kinds
                ]
                return {"oneOf": made}
            case _:
                more = {"properties": {"z": {"type": "integer"}}, "required": ["z"]}
                return {"type": "object", "allOf": [{"properties": {"y": self.part(depth)}}, more], "required": ["y"]}


def checker(schema: Any) -> jsonschema.protocols.Validator:
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    return kind(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


def sweep(llm: LLM, schemas: list[Any], temperature: float = 1.5, max_tokens: int = 200) -> collections.Counter[str]:
    """Counts what became of them. Raises AssertionError for a text that ended and does not validate."""
    counts: collections.Counter[str] = collections.Counter()
    bias = {llm.tokenizer.encode(text)[0]: 3.0 for text in CLOSING}
    asked = []
    for i, schema in enumerate(schemas):
        params = SamplingParams(
            structured_outputs={"json": schema}, temperature=temperature, seed=i, max_tokens=max_tokens, logit_bias=bias
        )
        try:
            llm.engine.check([1, 2, 3], params)
        except RequestError as error:
            counts["refused: " + str(error).removeprefix("structured_outputs.json: ")[:60]] += 1
            continue
        asked.append((schema, params))
    outputs = llm.generate([[1, 2, 3 + i % 50] for i in range(len(asked))], [p for _, p in asked], use_tqdm=False)
    for (schema, _), output in zip(asked, outputs, strict=True):
        (completion,) = output.outputs
        if completion.finish_reason != "stop":
            assert completion.finish_reason == "length", (output.error, schema)
            counts["cut off"] += 1
            continue
        try:
            checker(schema).validate(json.loads(completion.text))
        except Exception as error:
            counts["INVALID"] += 1
            print(json.dumps({"schema": schema, "text": completion.text, "error": f"{error}"[:200]}), flush=True)
        else:
            counts["valid"] += 1
    return counts


if __name__ == "__main__":
    count, folder, seed = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0
    with LLM(folder, max_num_seqs=32, max_num_batched_tokens=128, dtype="float32") as model:
        total: collections.Counter[str] = collections.Counter()
        for start in range(0, count, 250):
            total += sweep(model, [Maker(seed * 10**6 + i).schema() for i in range(start, min(start + 250, count))])
            print(start, {k: v for k, v in total.items() if ":" not in k}, flush=True)
        for what, times in total.most_common():
            print(times, what)
