"""What runs on each host: `host.py PORT SIZE RANK FOLDER OPTIONS WHAT`; process 0 prints results, each a line."""

import json
import sys

from jaxinfer import LLM, AsyncEngine, SamplingParams, distributed
from jaxinfer.engine import load

port, size, rank, folder, options, what = sys.argv[1:]
distributed.initialize(f"127.0.0.1:{port}", int(size), int(rank), timeout=60.0, heartbeat_timeout=60.0)


def counted(model, checkpoint, *rest, load_weights=load.load_weights):
    params = load_weights(model, checkpoint, *rest)
    print(json.dumps({"read": getattr(checkpoint, "bytes_read", None), "of": checkpoint.nbytes}), flush=True)
    return params


load.load_weights = counted
params = [
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    SamplingParams(
        temperature=0.9, top_k=20, seed=1, max_tokens=8, logprobs=2, structured_outputs={"regex": "[a-z ]+"}
    ),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=8, logit_bias={300: 4.0}),
]
prompts = [[1, 5, 9], list(range(2, 45)), [7] * 9]
if what == "many":  # for each of eight shards of rows to have some
    params, prompts = params * 3, [[*prompt, n] for n in range(3) for prompt in prompts]
if what == "async":
    import asyncio

    async def run(engine):
        async for output in engine.generate({"prompt_token_ids": prompts[0]}, params[0]):
            if output.finished:
                print(json.dumps(output.outputs[0].token_ids), flush=True)

    async def main():
        async with AsyncEngine(folder, **json.loads(options)) as engine:
            await run(engine)

    asyncio.run(main())
    sys.exit(0)
with LLM(folder, **json.loads(options)) as llm:
    while True:
        adapters = [*llm.list_adapters(), None] * len(prompts)
        outputs = llm.generate(prompts, params, adapter=adapters[: len(prompts)], use_tqdm=False)
        print(json.dumps([output.outputs[0].token_ids for output in outputs]), flush=True)
        if what not in ("forever", "interrupted"):
            break
        if what == "interrupted":  # Ctrl-C, and on it goes
            try:
                print(json.dumps("waiting"), flush=True)
                while True:
                    llm.generate(prompts, params, use_tqdm=False)
            except KeyboardInterrupt:
                what = "once"
    print(json.dumps(llm.score([prompts[1]], use_tqdm=False)[0].logprob), flush=True)
if what == "once":
    try:
        LLM(folder)
    except ValueError as error:
        print(json.dumps(str(error)), flush=True)
