"""The page: its files, what it may load, and, where node is, how it reads a stream."""

import json
import re
import shutil
import subprocess

import pytest

from jaxinfer.server.pages import FOLDER, KINDS

CHUNKS = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
    {"choices": [{"delta": {"reasoning": "hm"}, "finish_reason": None, "logprobs": None}]},
    {
        "choices": [
            {"delta": {"content": "h\u00e9\n\n<b>"}, "finish_reason": None, "logprobs": {"content": [{"token": "a"}]}}
        ]
    },
    {"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "c"}]}, "finish_reason": "tool_calls"}]},
    {"choices": [], "usage": {"prompt_tokens": 1}},
]


def test_files(client):
    for path, kind in {"/": "text/html", "/page/page.js": "text/javascript", "/page/page.css": "text/css"}.items():
        answer = client.get(path)
        assert answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    assert client.get("/page/nothing").status_code == client.get("/page/..%2fapp.py").status_code == 404


def test_the_page_loads_nothing_from_elsewhere_and_writes_no_html():
    for name in KINDS:
        text = (FOLDER / name).read_text()
        assert not re.search(
            r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(| on\w+=\"| style=\"", text
        )
    page, script = (FOLDER / "index.html").read_text(), (FOLDER / "page.js").read_text()
    assert set(re.findall(r'\$\("(\w+)"\)', script)) <= set(re.findall(r'id="(\w+)"', page))
    assert set(re.findall(r"fields\.(\w+)", script)) <= set(re.findall(r'name="(\w+)"', page))


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_a_stream_becomes_a_message(tmp_path):
    script = (FOLDER / "page.js").read_text()
    functions = re.findall(r"^export (?:async )?function.*?^}$", script, re.MULTILINE | re.DOTALL)
    assert len(functions) == 3
    frames = (
        ": ping\n\n" + "".join(f"data: {json.dumps(c, ensure_ascii=False)}\n\n" for c in CHUNKS) + "data: [DONE]\n\n"
    )
    (tmp_path / "run.mjs").write_text(
        "\n".join(functions)
        + f"""
const bytes = new TextEncoder().encode({json.dumps(frames)});
for (const size of [1, 7, 10000]) {{
  const body = new ReadableStream({{
    start(stream) {{
      for (let i = 0; i < bytes.length; i += size) stream.enqueue(bytes.slice(i, i + size));
      stream.close();
    }},
  }});
  const message = {{ content: "", reasoning: "", calls: [], tokens: [] }};
  for await (const chunk of events(body)) add(message, chunk);
  console.log(JSON.stringify(message));
}}
const tokens = ["hm", "</think>", " 4", " <b>", "2", "</s>"].map((token) => ({{ token }}));
console.log(JSON.stringify(cut("4 <b>2", tokens).map(([text, token]) => [text, token.token])));
"""
    )
    done = subprocess.run(["node", str(tmp_path / "run.mjs")], capture_output=True, text=True, timeout=60, check=True)
    *lines, pieces = done.stdout.splitlines()
    assert json.loads(pieces) == [["4", " 4"], [" <b>", " <b>"], ["2", "2"]]
    assert len(lines) == 3
    assert len(set(lines)) == 1
    message = json.loads(lines[0])
    assert (message["content"], message["reasoning"], message["finish"]) == ("hé\n\n<b>", "hm", "tool_calls")
    assert (message["calls"][0]["id"], message["usage"]["prompt_tokens"]) == ("c", 1)
