"""What a user asks for, as a grammar of llguidance's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxinfer.errors import RequestError
from jaxinfer.sampling.json_schema import in_fewer_words
from jaxinfer.sampling.structured import PARAM, StructuredOutputsParams
from jaxinfer.text.strict import SPACES_IN_JSON

MOST_OPTIONAL = 400  # properties: llguidance looks at all of an object's at once, at most 2,000 things in all
MOST_SQUARED = 10**6  # of all objects: the time that they take goes with the squares, half a second for so much
_LENIENT = '"x-guidance": {"lenient": true} in the schema leaves out what can\'t be followed'
REMEDIES = {  # of what llguidance says of a schema
    "Unimplemented": _LENIENT,
    "Unknown format": _LENIENT,
    "coerce_one_of": '"x-guidance": {"coerce_one_of": true} in the schema takes oneOf for anyOf',
}


def grammar_of(asked: StructuredOutputsParams, special: Mapping[str, int]) -> str:
    """The grammar. special: tokens that `after` and `unless` may be, by how they are written. Raises RequestError for
    what can be seen without a tokenizer."""
    try:
        grammar = _MAKERS[asked.kind](asked)
        return grammar if asked.after is None and asked.unless is None else _within(grammar, asked, special)
    except RequestError:
        raise
    except RecursionError:
        raise refusal(asked, "it is nested too deeply") from None
    except Exception as error:  # of llguidance's converters, which raise what comes
        raise refusal(asked, str(error)) from None


def _within(grammar: str, asked: StructuredOutputsParams, special: Mapping[str, int]) -> str:
    """After free text that ends with `after`, and some whitespace perhaps, the grammar; or what begins with one of
    `unless`, and is free."""
    answer = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
    answer[0]["name"] = "answer"

    def token(text: str) -> str:
        return f"<[{special[text]}]>" if text in special else json.dumps(text, ensure_ascii=False)

    start, rules = "@answer", [r"SPACE: /[ \t\r\n]{1,4}/"]
    if asked.unless is not None:
        start = "(@answer | free)"
        rest = "/(.|\\n)+/" + (f" | <[{','.join(map(str, sorted(special.values())))}]>" if special else "")
        rules.append(f"free: ({' | '.join(map(token, asked.unless))}) ({rest})*")
    if asked.after is not None:
        start = f"before SPACE? {start}"
        rules.append(f"before{'' if asked.after in special else '[lazy]'}: /(.|\\n)*/ {token(asked.after)}")
    outer = "\n".join([f"start: {start}", *rules, ""])
    return json.dumps({"grammars": [{"name": "outer", "lark_grammar": outer}, *answer]})


def refusal(asked: StructuredOutputsParams, problem: str) -> RequestError:
    """One line, which names the keyword that can't be done."""
    problem = one_line(problem)
    keyword = ""
    if asked.kind == "json":
        signs = {" regex ": "pattern: ", "Resource '": "$ref: ", "Pointer '": "$ref: "}
        keyword = next((word for sign, word in signs.items() if sign in f" {problem}"), "")
        remedy = next((f"; {remedy}" for sign, remedy in REMEDIES.items() if sign in problem), "")
        problem = problem.split(". Enable ")[0] + remedy
    return RequestError(f"{PARAM}.{asked.kind}: {keyword}{problem}", PARAM)


def one_line(problem: str) -> str:
    """What llguidance says, without what only its authors need."""
    return " ".join(problem.split("<state>")[0].split("<non-verbose/>")[0].split())[:300]


def _json(asked: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    schema = {"type": "object"} if asked.json is None else json.loads(str(asked.json))
    if schema is False:
        raise refusal(asked, "no text matches false")
    schema = {} if schema is True else in_fewer_words(schema)
    optional = list(_optional_properties(schema))
    if max(optional, default=0) > MOST_OPTIONAL or sum(count**2 for count in optional) > MOST_SQUARED:
        raise refusal(
            asked,
            f"properties: an object may have at most {MOST_OPTIONAL} that are not required, and the squares of their "
            f"numbers may come to {MOST_SQUARED}",
        )
    spaces: dict[str, Any] = {"whitespace_pattern": asked.whitespace_pattern or SPACES_IN_JSON}
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema, ensure_ascii=False),
        overrides={"whitespace_flexible": False} if asked.disable_any_whitespace else spaces,  # type: ignore[arg-type]
    )


def _regex(asked: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(str(asked.regex))


def _choice(asked: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in asked.choice or ())
    return LLMatcher.grammar_from_lark(f"start: {texts}")


def _grammar(asked: StructuredOutputsParams) -> str:
    from llguidance import grammar_from

    return grammar_from("grammar", str(asked.grammar))


def _structural_tag(asked: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher, StructTag

    tag = json.loads(str(asked.structural_tag))
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if not isinstance(structures, list) or not isinstance(triggers, list) or not structures:
        raise refusal(asked, 'it must have lists "structures" and "triggers"; other forms are not supported')
    tags = []
    for i, structure in enumerate(structures):
        fields = [structure.get(name) if isinstance(structure, dict) else None for name in ("begin", "end")]
        begin, end = fields
        schema = structure.get("schema", structure.get("parameters")) if isinstance(structure, dict) else None
        trigger = next((t for t in triggers if t and isinstance(begin, str) and begin.startswith(t)), None)
        if trigger is None or not isinstance(end, str) or not isinstance(schema, dict):
            raise refusal(
                asked,
                f'structures[{i}] must have texts "begin" and "end", a "schema", and one of the triggers before it',
            )
        tags.append(StructTag(trigger=trigger, begin=str(begin), grammar=schema, end=end))
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=False))


_MAKERS: dict[str, Callable[[StructuredOutputsParams], str]] = {
    "json": _json,
    "json_object": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}


def _optional_properties(schema: Any) -> Iterator[int]:
    """How many each object of a schema has that are not required."""
    pending = [schema]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            properties, required = item.get("properties"), item.get("required")
            if isinstance(properties, dict):
                yield len(properties.keys() - set(map(str, required if isinstance(required, list) else ())))
            pending += item.values()
        elif isinstance(item, list):
            pending += item
