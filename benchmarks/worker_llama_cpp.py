"""Worker of vs_llama_cpp.py: llama.cpp through llama-cpp-python. Arguments: a GGUF file, threads."""

import os
import sys
import time

import llama_cpp
import numpy as np
from peers import peak_bytes, serve

SEQUENCES, LENGTH = 16, 256  # at once, and of each with what it is asked for
threads = int(sys.argv[2])
start = time.perf_counter()
silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, None)
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
options = llama_cpp.llama_context_default_params()
options.n_ctx = options.n_batch = SEQUENCES * LENGTH
options.n_seq_max = SEQUENCES
options.n_threads = options.n_threads_batch = threads
context = llama_cpp.llama_init_from_model(model, options)
memory = llama_cpp.llama_get_memory(context)
vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
batch = llama_cpp.llama_batch_init(SEQUENCES * LENGTH, 0, 1)
load_seconds = time.perf_counter() - start


def step(sequences: list[list[int]], position: int) -> list[int]:
    """Evaluates these tokens of each sequence, which all have so many before; the best token after each."""
    batch.n_tokens = sum(map(len, sequences))
    last, at = [], 0
    for number, tokens in enumerate(sequences):
        for i, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position + i, 1
            batch.seq_id[at][0], batch.logits[at] = number, i == len(tokens) - 1
            at += 1
        last.append(at - 1)
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")
    logits = (llama_cpp.llama_get_logits_ith(context, i) for i in last)
    return [int(np.ctypeslib.as_array(row, (vocab,)).argmax()) for row in logits]


def answer(prompts: list[list[int]], new_tokens: int) -> dict[str, object]:
    start = time.perf_counter()
    llama_cpp.llama_memory_clear(memory, True)
    steps = [step(prompts, 0)]
    while len(steps) < new_tokens:
        steps.append(step([[token] for token in steps[-1]], len(prompts[0]) + len(steps) - 1))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": list(zip(*steps, strict=True)), "peak": peak_bytes()}


serve({"weights": os.path.getsize(sys.argv[1]), "cache": 0, "load_seconds": load_seconds}, answer)
