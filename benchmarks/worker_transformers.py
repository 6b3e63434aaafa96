"""Worker of vs_transformers.py: transformers on torch. Arguments: folder, dtype, threads."""

import sys
import time

import torch
from peers import peak_bytes, serve
from transformers import AutoModelForCausalLM

torch.set_num_threads(int(sys.argv[3]))
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).eval()
load_seconds = time.perf_counter() - start


@torch.inference_mode()
def answer(prompts: list[list[int]], new_tokens: int) -> dict[str, object]:
    ids = torch.tensor(prompts)
    mask = torch.ones_like(ids)
    start = time.perf_counter()
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": out[:, ids.shape[1] :].tolist(), "peak": peak_bytes()}


weights = sum(p.numel() * p.element_size() for p in model.parameters())
serve({"weights": weights, "cache": 0, "load_seconds": load_seconds}, answer)
