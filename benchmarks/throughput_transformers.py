"""Worker of throughput.py: transformers on torch, in float32. Arguments: folder, threads."""

import sys
import time
from typing import Any

import torch
from peers import serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

BATCH = 16
PAGE = 256

torch.set_num_threads(int(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="sdpa").eval()


def padded(work: list[Any]) -> list[list[int]]:
    """Batches of prompts of about one length, padded on the left; each batch runs to its longest output."""
    tokens: list[list[int]] = [[]] * len(work)
    order = sorted(range(len(work)), key=lambda i: len(work[i][0]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        width = max(len(work[i][0]) for i in batch)
        ids = torch.tensor([[0] * (width - len(work[i][0])) + work[i][0] for i in batch])
        mask = torch.tensor([[0] * (width - len(work[i][0])) + [1] * len(work[i][0]) for i in batch])
        new = max(work[i][1] for i in batch)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        for i, row in zip(batch, out[:, width:].tolist(), strict=True):
            tokens[i] = row[: work[i][1]]
    return tokens


def continuous(work: list[Any]) -> list[list[int]]:
    """What `generate_batch` does, with a length for each output: that method has one for all."""
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(n for _, n in work))
    # Room for a batch of the longest: with room for 128 requests at once it had not finished after 20 minutes.
    longest = max(-(-(len(prompt) + new) // PAGE) for prompt, new in work)
    pages = min(BATCH * longest, sum(-(-(len(prompt) + new) // PAGE) for prompt, new in work))
    batching = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=512)
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=batching, timeout=5, warmup=False
    ) as manager:
        names = [manager.add_request(prompt, max_new_tokens=new) for prompt, new in work]
        done: dict[str, list[int]] = {}
        while len(done) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"continuous batching failed: {result.error}")
                done[result.request_id] = result.generated_tokens
            elif result is None and not manager.is_running():
                raise RuntimeError("continuous batching ended before its requests did")
    return [done[name] for name in names]


@torch.inference_mode()
def answer(how: str, work: list[Any]) -> dict[str, Any]:
    start = time.perf_counter()
    tokens = {"padded": padded, "continuous": continuous}[how](work)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


serve({}, answer)
