"""Worker of vs_llama_cpp.py: llama.cpp through llama-cpp-python. Arguments: a GGUF file, threads."""

import os
import sys
import time

import llama_cpp
import numpy as np
from peers import peak_bytes, serve

threads = int(sys.argv[2])
start = time.perf_counter()
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
load_seconds = time.perf_counter() - start


def best() -> int:
    """The token after those that were evaluated last."""
    return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).argmax())


def answer(prompts: list[list[int]], new_tokens: int) -> dict[str, object]:
    start = time.perf_counter()
    tokens = []
    for prompt in prompts:
        llm.reset()
        llm.eval(prompt)
        out = [best()]
        while len(out) < new_tokens:
            llm.eval(out[-1:])
            out.append(best())
        tokens.append(out)
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "peak": peak_bytes()}


serve({"weights": os.path.getsize(sys.argv[1]), "cache": 0, "load_seconds": load_seconds}, answer)
