"""Programs of models without a cache through the real TPU compiler (libtpu, no TPU)."""

import json
import os
import subprocess
import sys

import pytest

from tests.engine.tpu import MIB, QUIET

pytest.importorskip("libtpu")

# In a process of its own: libtpu can be loaded once, and this one has devices of its own kind.
SCRIPT = """
import json, sys
from pathlib import Path
from jaxinfer.engine.config import check_options
from jaxinfer.engine.loading import Opened
from jaxinfer.plan.compile import compiled_program
from jaxinfer.plan.pooled import fit_pooled
from jaxinfer.plan.targets import find_target

for topology, config in json.loads(sys.argv[1]):
    options = {"dtype": "bfloat16", "max_num_batched_tokens": 2048, "max_model_len": 500}
    opened = Opened(Path("model"), config, "embed", None, None, check_options(options), options, 0.0)
    programs = fit_pooled(opened, find_target(topology)).programs
    program = compiled_program(programs, ("pool", programs.sizes[-1]))
    print(json.dumps([programs.sizes[-1], program.temporaries, program.padding, program.seconds]), flush=True)
"""
SMALL = {"vocab_size": 4096, "num_hidden_layers": 1}
BERT = {"model_type": "bert", **SMALL}
MODERNBERT = {
    "model_type": "modernbert",
    **SMALL | {"num_hidden_layers": 2},  # the second one has a window
    "hidden_size": 1024,
    "intermediate_size": 2624,
    "num_attention_heads": 16,
}
QWEN3 = {
    "model_type": "qwen3",
    **SMALL,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
GEMMA = {
    "model_type": "gemma3_text",
    **SMALL,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "use_bidirectional_attention": True,
}
# A slice, a model's widths, and MiB at most: a call's 2,048 tokens (of v6e-8's chips 256 each, but a text of 512).
FEW = [("v5e-1", BERT, 16), ("v6e-8", MODERNBERT, 24)]
OTHERS = [
    ("v6e-8", BERT, 16),
    ("v5e-1", MODERNBERT, 24),
    ("v5e-1", GEMMA, 16),
    ("v6e-8", GEMMA, 16),
    ("v5e-1", QWEN3, 24),
    ("v6e-8", QWEN3, 24),
    ("v5e-1", {**BERT, "model_type": "mpnet"}, 32),
]


@pytest.mark.parametrize(
    "cases", [pytest.param(FEW, marks=pytest.mark.slow), pytest.param(OTHERS, marks=pytest.mark.long)]
)
def test_temporaries(cases):
    """What a call needs beside weights doesn't grow with the layers, as each one's is freed."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([case[:2] for case in cases])],
        capture_output=True,
        text=True,
        env=os.environ | QUIET | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for (tokens, temporaries, padding, seconds), (topology, config, most) in zip(lines, cases, strict=True):
        size = temporaries / MIB
        print(f"{topology} {config['model_type']}, {tokens} tokens: {size:.1f} MiB, compiled in {seconds:.0f} s")
        assert size < most, (topology, config["model_type"])
        assert padding < 4 * MIB
