"""What a user asks for, as a grammar of llguidance's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxinfer.engine.guided.lark import check_lark
from jaxinfer.errors import RequestError
from jaxinfer.json_schema import closed, written
from jaxinfer.sampling.structured import StructuredOutputsParams

_LENIENT = '"x-guidance": {"lenient": true} in the schema leaves out what can\'t be followed'
REMEDIES = {  # of what llguidance says of a schema
    "Unimplemented": _LENIENT,
    "Unknown format": _LENIENT,
    "coerce_one_of": '"x-guidance": {"coerce_one_of": true} in the schema takes oneOf for anyOf',
}
SIGNS = {" regex ": "pattern: ", "Resource '": "$ref: ", "Pointer '": "$ref: "}
SHORTER = "write shorter patterns, or smaller numbers in repetitions such as {{1,200}}"
# What llguidance says of its limits, with the number, and what that means.
LIMITS = {
    r"Current row has \d+ items; max is (\d+)": "more than {} rules may be begun at once: write lists as (item)*, or "
    "with the recursion at the left, and fewer ways to read a text",
    r"Too many items \(limit (\d+)": "one token takes more than {} steps through rules: write terminals of several "
    "characters in place of rules, and fewer alternatives",
    r"too many states: \d+ >= (\d+)": f"patterns and terminals have more than {{}} states: {SHORTER}",
    r"too many expressions constructed|relevance of lexemes": "one token takes more steps through patterns than are "
    f"allowed: {SHORTER}",
    r"lexer configuration \(grammar\) too big \(limit for this grammar: (\d+)": "all patterns and terminals take more "
    f"than {{}} steps to begin with: {SHORTER}",
    r"number of symbols\) too big \(limit for this grammar: (\d+)": "it has more than {} symbols: make it smaller, or "
    "leave parts of it to be any JSON",
    r"symbols\.len\(\)": "it has more than 65,000 parts: make it smaller",
    r"NoExtensionBias": "nothing that it allows can follow here: a rule or schema in it has no text",
}
# Of errors in Lark, with the lines around the place.
_OF_A_SCHEMA = re.compile(r"at (\d+)\(\d+\): failed to compile JSON schema: (.*?)(\n +\d+ \| .*|$)", re.DOTALL)
_OF_A_RULE = re.compile(r"at (\d+)\(\d+\): (?:failed to compile JSON schema: )?(.*?)(\n +\d+ \| .*|$)", re.DOTALL)


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
    """One line, which names the keyword that can't be done, and the tool or rule with the schema where there may be
    several."""
    place = asked.place(asked.kind)
    of_tools = "[]" in asked.asked_as
    if within := (_OF_A_RULE if of_tools else _OF_A_SCHEMA).match(problem):
        line, problem, around = within.groups()
        # The names of rules of structural tags and strict tools say which.
        rule = re.search(rf"\n +{line} \| ((?:tag|tool)_\w+): ", around, re.IGNORECASE)
        problem = _with_keyword(problem)
        if rule and of_tools:
            place = asked.place(tool=int(rule[1].split("_")[1]))
        elif rule:
            problem = f"{rule[1]}: {problem}"
    elif asked.kind == "json":
        problem = _with_keyword(problem)
    return asked.refusal(f"{place}: {one_line(problem)}")


def _with_keyword(problem: str) -> str:
    """What llguidance says of a schema, with the keyword and what helps."""
    problem = one_line(problem)
    keyword = next((word for sign, word in SIGNS.items() if sign in f" {problem}"), "")
    remedy = next((f"; {remedy}" for sign, remedy in REMEDIES.items() if sign in problem), "")
    return keyword + problem.split(". Enable ")[0] + remedy


def one_line(problem: str) -> str:
    """What llguidance says, without what only its authors need; of its limits, what they mean."""
    for said, meaning in LIMITS.items():
        if reached := re.search(said, problem):
            return meaning.format(*(f"{int(limit):,}" for limit in reached.groups()))
    for end in ("<state>", "<non-verbose/>", "<backtrace>"):
        problem = problem.split(end)[0]
    return " ".join(problem.split())[:300]


def _json(asked: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    schema = {"type": "object"} if asked.json is None else json.loads(str(asked.json))
    if schema is False:
        raise refusal(asked, "no text matches false")
    return LLMatcher.grammar_from_json_schema(written(schema, _whitespace(asked)))


def _whitespace(asked: StructuredOutputsParams) -> dict[str, Any]:
    """As options of llguidance's."""
    if asked.disable_any_whitespace:
        return {"whitespace_flexible": False, "whitespace_pattern": None}
    return {} if asked.whitespace_pattern is None else {"whitespace_pattern": asked.whitespace_pattern}


def _regex(asked: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    pattern = str(asked.regex)
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:  # which llguidance would leave out
        raise refusal(asked, "it ends within an escape sequence: write \\\\ for a backslash")
    return LLMatcher.grammar_from_regex(pattern)


def _choice(asked: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    # As one terminal: as many rules would take ten times as long.
    texts = json.dumps(asked.choice, ensure_ascii=False, separators=(" | ", ""))[1:-1]
    return LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: {texts}")


def _grammar(asked: StructuredOutputsParams) -> str:
    from llguidance import grammar_from

    grammar = grammar_from("grammar", str(asked.grammar))
    check_lark(grammar)
    return grammar


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
        schema = written(closed(schema) if asked.disable_additional_properties else schema, _whitespace(asked))
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
