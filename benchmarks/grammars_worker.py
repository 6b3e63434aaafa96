"""Worker of grammars.py. Arguments: jaxinfer or outlines-core, folder of a tokenizer, its vocabulary's size."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peers import serve

system, folder, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
Mask = Callable[[np.ndarray], None]
Accept = Callable[[int], None]


def jaxinfer() -> Callable[[str, Any], tuple[Mask, Accept]]:
    from jaxinfer import SamplingParams
    from jaxinfer.engine.guided.guides import Guides
    from jaxinfer.text.tokenizer import load_tokenizer

    guides = Guides(load_tokenizer(folder), size, [0])
    guides.prepare()

    def make(kind: str, value: Any) -> tuple[Mask, Accept]:
        guides._known.clear()  # it is to be understood each time
        guide = guides.guide(SamplingParams(structured_outputs={kind: value}), [0])
        assert guide is not None
        return lambda words: guides.fill([(guide, 0)], words[None]), lambda token: guide.accept([token])

    return make


def outlines_core() -> Callable[[str, Any], tuple[Mask, Accept]]:
    from outlines_core import Guide, Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # Byte-level BPE writes bytes as characters: those that are printed as themselves, and others from 256 on.
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    byte = {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}
    assert set(byte) == set(ByteLevel.alphabet())
    tokens = {bytes(byte[c] for c in text): [i] for text, i in tokenizer.get_vocab().items() if i}
    vocabulary = Vocabulary(0, tokens)

    def make(kind: str, value: Any) -> tuple[Mask, Accept]:
        if kind == "json":
            regex = build_regex_from_schema(json.dumps(value))
        else:
            regex = "|".join(map(re.escape, value)) if kind == "choice" else value
        guide = Guide(Index(regex, vocabulary))
        return (
            lambda words: guide.write_mask_into(words.ctypes.data, words.size, 4),
            lambda token: guide.advance(token, return_tokens=False),
        )

    return make


start = time.process_time()
make = jaxinfer() if system == "jaxinfer" else outlines_core()
ready = {"vocabulary": time.process_time() - start}


def answer(kind: str, value: Any, ids: list[int]) -> dict[str, Any]:
    """CPU time: until the first mask is there, and of each token that is taken, with the next mask. Masks are of `ids`,
    or this raises AssertionError."""
    words = np.zeros(-(-size // 32), np.uint32)
    start = time.process_time()
    mask, accept = make(kind, value)
    mask(words)
    first, steps = time.process_time() - start, []
    for i, token in enumerate(ids):
        assert words[token >> 5] >> (token & 31) & 1, f"{token} is not allowed after {ids[:i]}"
        start = time.process_time()
        accept(token)
        if i + 1 < len(ids):  # after the last one nothing may follow
            mask(words)
            steps.append(time.process_time() - start)
    return {"first": first, "steps": steps}


serve(ready, answer)
