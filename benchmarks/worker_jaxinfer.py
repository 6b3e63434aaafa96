"""Worker of vs_transformers.py and vs_llama_cpp.py: jaxinfer. Arguments: folder, dtype, perhaps quantization."""

import json
import sys
import time
from pathlib import Path

from peers import peak_bytes, serve

from jaxinfer import LLM, SamplingParams

# Each prompt is asked for twice, for 1 token and for 64: the second prefill must cost what the first one did.
quantization = sys.argv[3] if len(sys.argv) > 3 else None
llm = LLM(sys.argv[1], dtype=sys.argv[2], quantization=quantization, max_num_seqs=16, enable_prefix_caching=False)


def answer(prompts: list[list[int]], new_tokens: int) -> dict[str, object]:
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": [o.outputs[0].token_ids for o in outputs], "peak": peak_bytes()}


held = {name: a.size * a.dtype.itemsize for name, a in llm.model.abstract.items()}
config = json.loads((Path(sys.argv[1]) / "config.json").read_text())
hit = config.get("num_experts_per_tok", 1) / config.get("num_experts", 1)
# By each token that is decoded alone.
read = sum(size * (hit if ".experts." in name else 1) for name, size in held.items() if "embed_tokens" not in name)
serve({"weights": sum(held.values()), "read": read, "cache": llm.sizes.bytes, "load_seconds": llm.load_seconds}, answer)
