"""Thousands of guided and plain requests beside each other, many of them broken off: nothing stays behind."""

import asyncio
import os

import numpy as np
import pytest

from jaxinfer import AsyncEngine, RequestError, SamplingParams
from tests.engine.test_guided import FORMS, OPTIONS, check, prompt
from tests.settled import settled

COUNT = int(os.environ.get("JAXINFER_SOAK_REQUESTS", "5000"))
BAD = [
    {"regex": "(?=a)b"},
    {"choice": []},
    {"grammar": "root ::= nothing"},
    {"json": {"type": "object", "$ref": "http://x"}},
]


@pytest.mark.long
def test_guided_and_plain_requests_with_aborts(checkpoints):
    random = np.random.default_rng(0)
    made = [(int(random.integers(0, 8)), int(random.integers(2**31))) for _ in range(COUNT)]
    ended = {"stop": 0, "length": 0, "left": 0, "refused": 0}

    async def ask(engine, kind, seed):
        own = np.random.default_rng(seed)
        form = [*FORMS, None, None, "bad"][kind]
        fields = BAD[seed % len(BAD)] if form == "bad" else {form: FORMS[form]} if form else None
        left = int(own.integers(1, 10)) if own.random() < 0.3 else None
        try:
            params = SamplingParams(
                temperature=1.0,
                seed=seed,
                max_tokens=int(own.integers(1, 40)),
                n=1 + int(seed % 7 == 0),
                structured_outputs=fields,
            )
            async for output in engine.generate(prompt(seed % 50), params):
                if left is not None and len(output.outputs[0].token_ids) >= left and not output.finished:
                    ended["left"] += 1
                    return
        except RequestError:
            assert form == "bad"
            ended["refused"] += 1
            return
        assert form != "bad"
        ended[output.outputs[0].finish_reason] += 1
        if form is not None:
            for completion in output.outputs:
                if completion.finish_reason == "stop":
                    check(form, completion)

    async def run(engine):
        limit = asyncio.Semaphore(32)

        async def one(kind, seed):
            async with limit:
                await ask(engine, kind, seed)

        await asyncio.gather(*(one(*own) for own in made))

    engine = AsyncEngine(checkpoints("llama").folder, **OPTIONS)
    try:
        asyncio.run(run(engine))
        settled(engine)
    finally:
        engine.close()
    print(ended)
    assert sum(ended.values()) == COUNT
    assert min(ended.values()) > COUNT // 40
