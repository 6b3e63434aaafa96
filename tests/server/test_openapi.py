"""/openapi.json says what the routes take and answer."""

import httpx2 as httpx
import jsonschema
import pytest

from jaxinfer.openai.schema import CHECKED
from jaxinfer.server.app import GET, POST
from jaxinfer.server.openapi import BODIES

# Objects of which a request may have any fields; of the others they are listed.
FREE = {"chat_template_kwargs", "guided_decoding", "logit_bias", "metadata", "response_format", "schema"}
GENERATES = [path for path in POST if "/v1/chat" in path or path.startswith(("/v1/comp", "/v1/res", "/v1/mes", "/tok"))]


@pytest.fixture(scope="module")
def document(server):
    return httpx.get(f"{server.url}/openapi.json").json()


def body_schema(document, path):
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def fields(schema):
    for name, inner in schema["properties"].items():
        yield name, inner
        if "properties" in inner:
            yield from fields(inner)


def test_all_routes_and_fields(document):
    assert set(document["paths"]) == {path.replace(":path}", "}") for path in [*GET, *POST]}
    seen = set()
    for path in POST:
        schema = body_schema(document, path)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["properties"].get("model") == ({"enum": ["tiny", "other", None]} if "lora" not in path else None)
        for name, field in fields(schema):
            seen.add(name)
            assert field, f"{path}: nothing is said of {name}: it belongs into CHECKED"
            kind = field.get("type")
            if "object" in (kind if isinstance(kind, list) else [kind]) and name not in FREE:
                assert "properties" in field, f"{path}: no example of BODIES has {name}"
                assert field["additionalProperties"] is False
    assert seen >= CHECKED.keys()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert all(operation["summary"] for operation in operations)


def test_schemas_come_from_readers(document):
    chat, completion = (
        body_schema(document, f"/v1/{name}")["properties"] for name in ("chat/completions", "completions")
    )
    assert chat["logprobs"] == {"type": ["boolean", "null"], "default": False}
    assert completion["logprobs"] == {"type": ["integer", "null"]}
    assert chat["priority"] == {"type": ["integer", "null"], "minimum": -1000, "maximum": 1000}
    assert completion["suffix"] == {"enum": ["", None]}
    assert chat["stream_options"]["properties"].keys() == {
        "include_usage",
        "continuous_usage_stats",
        "include_obfuscation",
    }
    assert "n" not in body_schema(document, "/v1/messages")["properties"]


@pytest.mark.parametrize("path", POST)
def test_examples(document, client, path):
    """They are answered, but without what is required, or with what is nobody's."""
    schema, answers = body_schema(document, path), document["paths"][path]["post"]["responses"]
    for example in BODIES[path][1]:
        body = {name: 1 for name in ("max_tokens", "max_output_tokens") if name in schema["properties"]} | example
        body = example if path == "/tokenize" else body
        jsonschema.validate(example, schema)
        answer = client.post(path, json=body)
        expected = 200 if path in GENERATES or path == "/detokenize" else 403 if "lora" in path else 400
        assert answer.status_code == expected, answer.text
        assert answer.headers["content-type"].partition(";")[0] in answers[str(answer.status_code)]["content"]
        for name in schema["required"]:
            less = {other: value for other, value in body.items() if other != name}
            answer = client.post(path, json=less)
            assert answer.status_code == (403 if "lora" in path else 400)
            jsonschema.validate(answer.json(), document["components"]["schemas"][_error(answers)])
            assert path not in GENERATES or name in answer.text
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(less, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(example | {"nonsense": 1}, schema)


def _error(answers):
    return answers["400"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
