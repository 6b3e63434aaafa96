"""A query and a document as one text, by a chat template: what rerankers that are language models were trained on.

A template writes what stands around the two, once; so a text that is too long loses the end of its document, and never
what comes after it, from which such a model answers.
"""

from __future__ import annotations

from jaxinfer.errors import ContextLengthError, RequestError
from jaxinfer.text.base import Tokenizer

LEAST_HEAD = 10  # characters of a template's first line, which no query begins with
# What stands for the two, and for a prompt, while a template writes what is around them. A template that strips them of
# white space has to do so with all that comes.
QUERY, DOCUMENT, PROMPT = " \ue000query\ue000 ", " \ue000document\ue000 ", "\ue000prompt\ue000"
_SAID = "(messages | selectattr('role', 'eq', '%s') | map(attribute='content') | first)"
_QWEN3 = """<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. \
Note that the answer can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ SYSTEM or "Given a web search query, retrieve relevant passages that answer the query" }}
<Query>: {{ QUERY }}
<Document>: {{ DOCUMENT }}<|im_end|>
<|im_start|>assistant
<think>

</think>{{ "\\n\\n" }}"""
_GEMMA = """{{ bos_token }}A: {{ QUERY }}
B: {{ DOCUMENT }}
{{ SYSTEM or "Given a query A and a passage B, determine whether the passage contains an answer to the query by \
providing a prediction of either 'Yes' or 'No'." }}"""


def _with_roles(text: str) -> str:
    for role in ("system", "query", "document"):
        text = text.replace(role.upper(), _SAID % role)
    return text


# Those that Qwen3-Reranker and bge-reranker-v2-gemma were trained on. Source: their cards.
TEMPLATES = {"qwen3_reranker": _with_roles(_QWEN3), "bge_reranker_gemma": _with_roles(_GEMMA)}


class PairTemplate:
    """One of a tokenizer.

    source: a template, or the name of one of the checkpoint's or of TEMPLATES; None: the checkpoint's default.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None):
        self._tokenizer = tokenizer
        self._source = source if source is None else TEMPLATES.get(source, source)
        self._written: dict[bool, str] = {}  # with a prompt, and without

    def ids(self, query: str, document: str, prompt: str | None, most: int | None) -> list[int]:
        """Those of the whole text. most: tokens of it; where there are more, the document loses its end. Raises
        RequestError."""
        written = self._write(bool(prompt))
        head = written.partition("\n")[0]
        if len(head) >= LEAST_HEAD and query.startswith(head):  # as programs have it that write templates themselves
            raise RequestError("the query is in the template already: give both texts as they are", "prompt")
        written = _put(_put(written, QUERY, query), PROMPT, prompt or "")
        kept = DOCUMENT in written
        document = document if kept else document.strip()
        before, after = written.split(DOCUMENT if kept else DOCUMENT.strip())
        ids = self._encode(before + document + after)
        if most is None or len(ids) <= most:
            return ids
        end = self._encode(after)
        start = self._encode(before + document)[: max(most - len(end), 0)]
        if len(start) <= len(self._encode(before)):
            raise ContextLengthError(
                f"the query and what stands around it have {len(self._encode(before + after))} tokens: with {most} in "
                "all nothing of the document would remain; shorten the query",
                "prompt",
            )
        return start + end

    def _write(self, prompted: bool) -> str:
        if prompted not in self._written:
            messages = [{"role": "system", "content": PROMPT}] if prompted else []
            messages += [{"role": "query", "content": QUERY}, {"role": "document", "content": DOCUMENT}]
            text = self._tokenizer.chat_prompt(messages, chat_template=self._source)
            for content in (QUERY, DOCUMENT, *([PROMPT] if prompted else [])):
                if text.count(content.strip()) != 1:
                    what, times = content.strip().strip("\ue000"), text.count(content.strip())
                    raise RequestError(
                        f"the chat template writes the {what} {times} times: give chat_template, one of messages with "
                        "the roles system, query and document",
                        "chat_template",
                    )
            self._written[prompted] = text
        return self._written[prompted]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _put(text: str, mark: str, content: str) -> str:
    """The content where its mark is."""
    return text.replace(mark, content) if mark in text else text.replace(mark.strip(), content.strip())
