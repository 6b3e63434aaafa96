"""Worker of scoring.py. Arguments: jaxinfer, folder; or hf, folder, batch size, threads."""

import sys
import time
from typing import Any

from peers import serve

if sys.argv[1] == "jaxinfer":
    from jaxinfer.lm_eval import JaxInferLM

    model: Any = JaxInferLM(sys.argv[2], dtype="float32", warmup=True)
else:
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(sys.argv[4]))
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
    tokenizer.pad_token = tokenizer.eos_token = "!"  # it has none, and HFLM wants one; its padding is not scored
    hf = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32, attn_implementation="sdpa")
    model = HFLM(pretrained=hf, tokenizer=tokenizer, backend="causal", batch_size=int(sys.argv[3]), device="cpu")


def answer(items: list[Any]) -> dict[str, Any]:
    start = time.perf_counter()
    scored = model._loglikelihood_tokens([(None, context, scored) for context, scored in items], disable_tqdm=True)
    return {"seconds": time.perf_counter() - start, "logprobs": [logprob for logprob, _ in scored]}


serve({}, answer)
