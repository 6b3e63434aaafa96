"""What is asked for as grammars, and what is refused by name; test_guided.py has texts that follow them."""

import contextlib
import functools
import json
import random
import re
import types

import llguidance
import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from jaxinfer import RequestError, SamplingParams, StructuredOutputsParams
from jaxinfer.engine.guided import guide
from jaxinfer.engine.guided.grammar import grammar_of
from jaxinfer.engine.guided.guides import Guides
from jaxinfer.sampling.slots import mask_words
from jaxinfer.text.formats import message_format
from jaxinfer.text.strict import strict_grammar, strict_section
from jaxinfer.text.tokenizer import load_tokenizer

PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return load_tokenizer(checkpoints("llama").folder)


@pytest.fixture(scope="module")
def guides(tokenizer):
    return Guides(tokenizer, tokenizer.vocab_size, [tokenizer.eos_token_id])


def test_after_a_special_token():
    """Which is no text: the same characters, one by one, are not it."""
    tokenizer = types.SimpleNamespace(
        require=lambda *_: None,
        cleans_up=False,
        looks_ahead=False,
        special_ids=frozenset([1]),
        token_bytes=None,
        all_bytes=lambda size: [*(b"e", b"<t>", b"a"), *([b""] * (size - 3))],
        encode_text=lambda text, **_: [],
    )
    guides = Guides(tokenizer, 40, [])
    one = guides.guide(SamplingParams(structured_outputs={"regex": "a", "after": "<t>"}), [])
    masks = np.zeros((1, 2), np.uint32)
    allowed = []
    for token in (0, 1, 2):
        guides.fill([(one, 0)], masks)
        allowed.append([i for i in range(40) if masks[0, i // 32] >> (i % 32) & 1])
        one.accept([token])
    assert allowed == [[0, 1, 2], [0, 1, 2], [2]]
    assert one.complete
    with pytest.raises(RequestError, match="'b' can't be written"):
        guides.guide(SamplingParams(structured_outputs={"choice": ["a", "b"]}), [])


@pytest.mark.parametrize(("states", "renewed"), [(10**5, 0), (1200, 1)])
def test_limits_are_each_sequence_s(tokenizer, monkeypatch, states, renewed):
    """Copies of a grammar share what is known of it, and its limits: who reaches them begins with a new one."""
    monkeypatch.setattr(llguidance, "LLParserLimits", functools.partial(LLParserLimits, max_lexer_states=states))
    monkeypatch.setattr(guide, "RENEWED_IN", 10.0)
    guides = Guides(tokenizer, tokenizer.vocab_size, [])
    asked = SamplingParams(structured_outputs={"regex": "(.*a){1,50}(.{3,30}b){1,200}"})
    rng, masks, origins = np.random.default_rng(0), np.zeros((2, mask_words(tokenizer.vocab_size)), np.uint32), set()
    pair = [guides.guide(asked, []) for _ in range(2)]
    for _ in range(100):
        guides.fill([(pair[0], 0), (pair[1], 1)], masks)
        assert masks.any(axis=1).all()
        for each in pair:
            each.accept(tokenizer.encode("abc"[rng.integers(3)]))
            assert each.error is None
            origins.add(id(each._origin))
    assert len(origins) > renewed if renewed else len(origins) == 1


AMBIGUOUS = {"grammar": 'start: e\ne: e e | "a" | "b" e | e "c"'}
PATTERN = {"regex": "(.*a){1,50}(.{3,30}b){1,200}"}
TWICE = {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}
ENDLESS = {"json": {"type": "array", "items": TWICE, "minItems": 1, "$defs": {"a": TWICE}}}


@pytest.mark.parametrize(
    ("form", "limits", "fact"),
    [
        (AMBIGUOUS, {"max_items_in_row": 20}, "more than 20 rules may be begun at once: write lists"),
        (AMBIGUOUS, {"step_max_items": 30}, "one token takes more than 30 steps through rules: write"),
        (PATTERN, {"max_lexer_states": 60}, "patterns and terminals have more than 60 states: write"),
        (PATTERN, {"step_lexer_fuel": 100}, "one token takes more steps through patterns than are allowed: write"),
        (PATTERN, {"initial_lexer_fuel": 200}, "all patterns and terminals take more than 200 steps to begin with"),
        ({"json_object": True}, {"max_grammar_size": 20}, "it has more than 20 symbols: make it smaller"),
        (ENDLESS, {}, "nothing that it allows can follow here: a rule"),
    ],
    ids=["items", "steps", "states", "patterns", "at first", "symbols", "endless"],
)
def test_limits_are_said_in_one_line(tokenizer, monkeypatch, form, limits, fact):
    """What was exceeded, and what helps; before it runs, or where it is met."""
    monkeypatch.setattr(llguidance, "LLParserLimits", functools.partial(LLParserLimits, **limits))
    guides = Guides(tokenizer, tokenizer.vocab_size, [])
    masks, error = np.zeros((1, mask_words(tokenizer.vocab_size)), np.uint32), None
    try:
        each = guides.guide(SamplingParams(structured_outputs=form), [])
        for _ in range(100):
            guides.fill([(each, 0)], masks)
            letters = [i for c in "abc[" for i in tokenizer.encode(c) if masks[0, i // 32] >> (i % 32) & 1]
            each.accept(letters[:1])
            if (error := each.error) is not None:
                break
    except RequestError as refused:
        error = str(refused)
    assert re.fullmatch(rf"structured_outputs(\.\w+)?: {re.escape(fact)}.*", str(error)), error


NESTED = functools.reduce(lambda inner, _: {"items": inner}, range(480), {})
NAMES = functools.reduce(
    lambda inner, _: {"propertyNames": {"enum": list("abcdefghij")}, "additionalProperties": inner}, range(8), {}
)
DOUBLED = "start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(40)) + 'T40: "a"*\n'
DEEP = '{"items":' * 10_000 + "{}" + "}" * 10_000
CYCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b~1"}]}, "b/": {"$ref": "#/%24defs/a"}}}
REFUSED = [
    ({}, "none of its kinds"),
    ({"json": {}, "regex": "a"}, "json and regex: give exactly one"),
    ({"jsn": {}}, "no 'jsn'"),
    ({"json": "{"}, "it is no JSON"),
    ({"json": "3"}, "it must be an object"),
    ({"json": {"a": {1}}}, "it is no JSON"),
    ({"json": DEEP}, "nested too deeply"),
    ({"json": NESTED}, "recursion limit|nested too deeply"),
    ({"json": NESTED, "disable_additional_properties": True}, "recursion limit|nested too deeply"),
    ({"json": {"enum": [f"value number {i}" for i in range(100_000)]}}, "more than 262144 bytes"),
    ({"json": {"properties": {f"p{i}": {} for i in range(3000)}}}, "at most 400 that are not required"),
    ({"json": {"anyOf": [{"properties": {f"{j}p{i}": {} for i in range(300)}} for j in range(20)]}}, "the squares of"),
    ({"json": {"required": [f"p{i}" for i in range(5000)]}}, "required: .* at most 4000"),
    ({"json": {"items": {"pattern": "a*" * 9000}}}, "pattern: the squares"),
    ({"json": {"x-guidance": 3}}, "x-guidance: "),
    ({"json": NAMES}, "propertyNames: .* bytes"),
    ({"json": {"propertyNames": {"enum": [f"p{i}" for i in range(500)]}}}, "at most 400 that are not required"),
    ({"json": {"type": "object", "propertyNames": {"maxLength": 3}}}, '"propertyNames"'),
    ({"json": {"not": {}}}, '"not".*"lenient": true'),
    ({"json": {"type": "array", "uniqueItems": True}}, '"uniqueItems"'),
    ({"json": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}, 'oneOf.*"coerce_one_of": true'),
    ({"json": {"type": "string", "pattern": "(?=a)b"}}, "pattern: .*look-around"),
    ({"json": {"type": "string", "format": "regex"}}, "Unknown format: regex; .*lenient"),
    ({"json": {"type": "string", "pattern": "\\bb"}}, "pattern: .*lookarounds"),
    ({"json": {"$ref": "https://example.org/schema"}}, r"\$ref: "),
    ({"json": CYCLE}, r"\$ref: #/.* -> #/\$defs/b~1 .*is a cycle"),
    (
        {"json": {"properties": {"x": {"anyOf": [{"$ref": "#/properties/x"}]}}}},
        r"\$ref: #/properties/x -> .* is a cycle",
    ),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
    ({"json": False}, "no text matches"),
    ({"json": {"$ref": "#"}}, "no text matches"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": r"(a)\1"}, "backreferences"),
    ({"regex": "a("}, "unclosed group"),
    ({"regex": "ab\\"}, "within an escape"),
    ({"regex": ""}, "not empty"),
    ({"regex": "\ud800"}, "surrogate"),
    ({"regex": r"[^\s\S]"}, "no text matches"),
    ({"choice": []}, "at least one"),
    ({"choice": "yes"}, "list of texts"),
    ({"choice": ["a", ""]}, "none of them empty"),
    ({"choice": [f"value number {i}" for i in range(100_000)]}, "bytes: at most"),
    ({"regex": "a*" * 10_000}, "bytes: at most 8192"),
    ({"grammar": "start: " + " | ".join(f'"v{i}"' for i in range(90_000))}, "bytes: at most"),
    ({"grammar": "start: missing"}, "missing"),
    ({"grammar": 'root ::= "a'}, "grammar: "),
    ({"grammar": DOUBLED}, "terminals: the squares"),
    ({"grammar": "start: A\nA: /(a*b+c?){2}/ B B\nB: " + '"a"* ' * 5000}, "terminals: the squares"),
    ({"grammar": "start: %json " + json.dumps({"properties": {f"p{i}": {} for i in range(500)}})}, "at most 400"),
    ({"grammar": "start: %json " + json.dumps(CYCLE)}, r"\$ref: .* is a cycle"),
    ({"structural_tag": {"format": {}}}, "structures"),
    ({"json_object": "yes"}, "True or False"),
    ({"choice": ["a"], "whitespace_pattern": " "}, "for json"),
]


@pytest.mark.parametrize(("fields", "fact"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(guides, fields, fact):
    """In one line."""
    with pytest.raises(RequestError, match=fact) as raised:
        guides.guide(SamplingParams(structured_outputs=fields), [])
    assert raised.value.param == "structured_outputs"
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def strict(parameters, name):
    """What strict tools become, the last one with these."""
    free = {"type": "function", "function": {"name": "free", "parameters": {"not": {}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
    grammar = strict_grammar(strict_section(message_format(name, None)), [free, tool], None, ())
    return {"grammar": grammar, "asked_as": "tools[].function.parameters"}


def tag(schema):
    other = {"begin": "<b>", "schema": {}, "end": "</b>"}
    return {"triggers": ["<"], "structures": [other, {"begin": "<a>", "schema": schema, "end": "</a>"}]}


OF_SCHEMAS = [
    (fields["json"], fact)
    for fields, fact in REFUSED
    if isinstance(fields.get("json"), dict) and len(fields) == 1 and "no text matches" not in fact
]


@pytest.mark.parametrize(("schema", "fact"), [case for case in OF_SCHEMAS if case[0] is not NESTED], ids=lambda _: "")
def test_schemas_are_refused_alike(guides, schema, fact):
    """As a form of the answer, after a tag, and as parameters of a strict tool, where the error says which."""
    if "bytes" not in fact and "it is no JSON" not in fact:
        with pytest.raises(RequestError, match=fact):
            guides.guide(SamplingParams(structured_outputs=strict(schema, "hermes")), [])
    if "it is no JSON" not in fact and "format" not in schema:  # which texts don't follow there
        properties = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
        with pytest.raises(RequestError, match=fact) as raised:
            guides.guide(SamplingParams(structured_outputs=strict(properties, "qwen3_coder")), [])
        assert str(raised.value).startswith("tools[1].function.parameters: ")
        assert raised.value.param == "tools"
    with pytest.raises(RequestError, match=fact) as raised:
        guides.guide(SamplingParams(structured_outputs={"structural_tag": tag(schema)}), [])
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("schema", "options"),
    [
        (PERSON | {"properties": {"name": {"type": "string", "format": "password"}, "n": {"type": "integer"}}}, {}),
        ({"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "number"}}, {}),
        ({"type": "array", "items": {"enum": [1, "é", None, {"a": []}]}}, {"whitespace_pattern": " {2}"}),
        ({"type": "array", "items": {"type": "boolean"}}, {"disable_any_whitespace": True}),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, {}),
        ({"type": "object", "properties": {"a": {}}}, {"disable_additional_properties": True}),
        ({"anyOf": [{"$ref": "#/$defs/a"}, {"const": 3}], "$defs": {"a": {"items": {"$ref": "#"}}}}, {}),
    ],
    ids=["format", "propertyNames", "whitespace", "none", "lenient", "closed", "$ref"],
)
def test_schemas_mean_the_same(schema, options):
    """As a form of the answer, after a tag and as parameters of a strict tool: the same is taken of random texts."""
    whole = grammar_of(StructuredOutputsParams(json=schema, **options), {})
    begins = [(b"", b"", whole)]
    tagged = grammar_of(StructuredOutputsParams(structural_tag=tag(schema), **options), {})
    begins.append((b"Well. <a>", b"</a>", tagged))
    if not options:
        begins.append((b'<tool_call>{"name":"f","arguments":', b"}</tool_call>", strict(schema, "hermes")["grammar"]))
    tokens, rng, whole_texts = LLTokenizer("byte"), random.Random(0), 0
    texts = [bytearray(b"[\n" + b" " * 33), bytearray(b"{\n" + b" " * 33), bytearray(b"[  "), bytearray(b"{  ")]
    for _ in range(60):
        matcher, text = LLMatcher(tokens, whole), bytearray()
        for _ in range(rng.randrange(40)):
            allowed = [i for i, bias in enumerate(matcher.compute_logit_bias()) if bias and i < 256]
            if matcher.is_stopped() or not allowed:
                break
            closers = [byte for byte in allowed if byte in b'"}],: ']
            text.append(rng.choice(closers if closers and rng.random() < 0.6 else allowed))
            matcher.consume_token(text[-1])
        if text and rng.random() < 0.3:
            text.insert(rng.randrange(len(text)), rng.choice(b'1"a,'))
        texts.append(text)
    for text in texts:
        taken = []
        for begin, end, grammar in begins:
            matcher = LLMatcher(tokens, grammar)
            assert matcher.consume_tokens(list(begin)), matcher.get_error()
            count = matcher.try_consume_tokens(list(text))
            taken.append((count, matcher.try_consume_tokens(list(end)) == len(end) and matcher.is_accepting()))
        whole_texts += taken[0][0] == len(text)
        for (begin, _, _), (count, ends) in zip(begins, taken, strict=True):
            assert count == taken[0][0], (text, begin)
            assert count < len(text) or ends == taken[0][1], (text, begin)
    assert 20 < whole_texts < 60


@pytest.mark.parametrize(
    ("own", "options", "spaces"),
    [
        ({}, {}, ["", " ", "\n" + " " * 32]),
        ({}, {"disable_any_whitespace": True}, [""]),
        ({"whitespace_pattern": " "}, {"disable_any_whitespace": True}, [""]),
        ({"whitespace_flexible": False}, {}, [""]),
        ({"whitespace_flexible": True}, {"whitespace_pattern": "  "}, ["", "  "]),
        ({"whitespace_pattern": "  "}, {}, ["", "  "]),
    ],
    ids=range(6),
)
def test_whitespace(own, options, spaces):
    schema = {"type": "array", "x-guidance": own}
    for form, end in (({"json": schema}, b""), ({"structural_tag": tag(schema)}, b"</a>")):
        grammar = grammar_of(StructuredOutputsParams(**form, **options), {})
        taken = []
        for space in ("", " ", "  ", "   ", "\n" + " " * 32, "\n" + " " * 33):
            matcher = LLMatcher(LLTokenizer("byte"), grammar)
            text = b"<a>" * bool(end) + f"[1,{space}2]".encode() + end
            if matcher.try_consume_tokens(list(text)) == len(text):
                taken.append(space)
        assert taken == spaces


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}}},
        {
            "type": "object",
            "properties": {"$ref": {"type": "string"}, "a": {"const": {"$ref": "#/properties/a/const"}}},
        },
    ],
    ids=["way out", "nested", "no references"],
)
def test_references_that_are_no_cycle(guides, schema):
    assert guides.guide(SamplingParams(structured_outputs={"json": schema}), [])


def chain(count):
    parts = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": parts | {f"d{count}": {}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"json": chain(4000)},
        {"structural_tag": tag(chain(4000))},
        strict(chain(4000), "hermes"),
        {"grammar": "start: a0\n" + "".join(f'a{i}: "x" a{i + 1}\n' for i in range(9000)) + 'a9000: "y"\n'},
        {"grammar": "start: A0\n" + "".join(f'A{i}: "x" A{i + 1}\n' for i in range(9000)) + 'A9000: "y"\n'},
    ],
    ids=["json", "structural_tag", "strict", "rules", "terminals"],
)
def test_long_chains(guides, fields):
    """They are followed or refused, and no stack ends there: that would be the end of the process."""
    with contextlib.suppress(RequestError):
        assert guides.guide(SamplingParams(structured_outputs=fields), []) is not None


def test_ambiguous_grammars_end(guides):
    """Each token takes them longer than the one before, and others wait."""
    one = guides.guide(SamplingParams(structured_outputs={"grammar": 'start: s\ns: s s | "a" | s s s | s s s s'}), [])
    token, count = guides.prepare().split("a"), 0
    while one.error is None:
        one.accept(token)
        count += 1
    assert re.search(r"takes \d+ ms a token on average, and 2 are allowed", one.error)
    assert 20 < count < 300


def test_long_texts_without_a_choice(guides, tokenizer):
    """At each step only their beginning is split into tokens, which are those of the whole."""
    text = "".join(random.Random(0).choices(["a b", "c", "é", "\n", "日本"], k=2000))
    one, asked = guides.guide(SamplingParams(structured_outputs={"choice": [text]}), []), []
    encode = tokenizer.encode_text
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(tokenizer), "encode_text", lambda self, text, **_: asked.append(text) or encode(text, **_))
        tokens = []
        while not one.complete:
            one.accept(forced := one.forced())
            tokens += forced
    assert tokens == tokenizer.encode_text(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == text
    assert max(len(text.encode()) for text in asked) <= 1024


def test_fields():
    """One form inside, whatever was given."""

    class Model:
        @staticmethod
        def model_json_schema():
            return PERSON

    same = [StructuredOutputsParams(json=form) for form in (PERSON, json.dumps(PERSON), Model)]
    assert {hash(params) for params in same} == {hash(same[0])}
    params = SamplingParams(structured_outputs=same[0])
    assert params.structured_outputs == SamplingParams(guided_json=PERSON).structured_outputs
    assert params.with_changes(max_tokens=3).structured_outputs is params.structured_outputs
    inner, free = {"properties": {"b": {}}}, {"type": "object"}
    closed = StructuredOutputsParams(
        json={"properties": {"a": inner, "properties": free}, "const": inner}, disable_additional_properties=True
    )
    assert json.loads(closed.json) == {
        "properties": {"a": inner | {"additionalProperties": False}, "properties": free},
        "const": inner,
        "additionalProperties": False,
    }
    with pytest.raises(RequestError, match="forced_eos_token_id"):
        SamplingParams(structured_outputs={"regex": "a"}, forced_eos_token_id=1)


NUMBER = {"type": "integer"}
LENIENT = {"x-guidance": {"lenient": True, "coerce_one_of": True}}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string", "format": "password"}, '"a b"'),  # OpenAPI's and pydantic's formats are no constraints
        ({"properties": {"format": {"type": "string", "format": "path"}}, "type": "object"}, '{"format": "a"}'),
        ({"const": {"format": "path"}}, '{"format": "path"}'),
        ({"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": NUMBER, "type": "object"}, '{"b": 1}'),
        ({"propertyNames": {"$ref": "#/$defs/n"}, "$defs": {"n": {"pattern": "^x"}}, "type": "object"}, '{"xy": "1"}'),
        ({"type": "array", "uniqueItems": False}, "[1, 1]"),
        ({"type": "object", "propertyNames": True}, '{"a": 1}'),
        (LENIENT | {"type": "array", "uniqueItems": True}, "[1, 1]"),
        (LENIENT | {"oneOf": [{"type": "string"}, {"maxLength": 3}], "not": {"const": "a"}}, '"a"'),
        (LENIENT | {"type": "string", "format": "regex"}, '"("'),
    ],
    ids=range(10),
)
def test_what_a_schema_need_not_say(guides, schema, text):
    """Keywords that constrain nothing, those that others say, and those that a schema does not insist on."""
    one = guides.guide(SamplingParams(structured_outputs={"json": schema}), [])
    one.accept(guides.prepare().split(text))
    assert one.error is None
    assert one.matcher.is_accepting()
