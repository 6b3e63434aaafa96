"""Worker of throughput.py: jaxinfer. Arguments: folder, options of LLM as JSON."""

import dataclasses
import json
import sys
from typing import Any

from peers import serve

from jaxinfer import LLM, benchmark

llm = LLM(sys.argv[1], **{"dtype": "float32", "warmup": True, **json.loads(sys.argv[2])})


def answer(work: list[Any], arrivals: list[float] | None = None) -> dict[str, Any]:
    """All at once by `LLM.generate`; or as they arrive, and when what came."""
    asked = [benchmark.Work(*request) for request in work]
    hits = llm.stats.hit_tokens
    if arrivals is not None:
        return {"traces": [dataclasses.asdict(trace) for trace in benchmark.serve(llm, asked, arrivals)]}
    seconds, tokens = benchmark.generate(llm, asked)
    return {"seconds": seconds, "tokens": tokens, "hit_tokens": llm.stats.hit_tokens - hits}


serve({"description": llm.description}, answer)
