"""The engine with the kernel for GPUs: its programs lowered for CUDA, without a GPU, and interpreted on a CPU."""

import functools
import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points

import jax
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType

from jaxinfer import LLM, SamplingParams
from jaxinfer.attention.gpu import GPU
from jaxinfer.attention.xla import XLAAttention
from jaxinfer.demo import MODEL_DIR
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.programs import Programs
from jaxinfer.models.model import AbstractModel

CONFIG = {
    "model_type": "mistral",
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "sliding_window": 100,
    "max_position_embeddings": 1024,
}


@pytest.fixture
def _allowed(monkeypatch):
    """On a CPU the kernel is refused."""
    monkeypatch.setattr(type(GPU), "supports", lambda *_: None)


def lowered(attention: str, **fields: object) -> dict[str, str]:
    """Both programs' text for CUDA."""
    model = AbstractModel.from_config(CONFIG | fields, "bfloat16")
    programs = Programs(
        model,
        jax.devices()[0],
        Buckets.make(8, 64),
        num_pages=333,
        page_size=16,
        max_model_len=512,
        max_rows=8,
        max_steps=4,
        attention=attention,
    )
    # Newer JAX asks which GPU it is for; older takes a Hopper where there is none.
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("all",), axis_types=(AxisType.Auto,), abstract_device=device)
    texts = {}
    for key in (("decode", 8), ("forward", 64)):
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(programs[key].function(), donate_argnums=1).trace(*programs[key].arguments)
        texts[key[0]] = traced.lower(lowering_platforms=("cuda",)).as_text()
    return texts


@pytest.mark.usefixtures("_allowed")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.slow
def test_lowered_for_cuda():
    """The kernel in each layer of both programs, and no pages are gathered; which they are in plain XLA."""
    for text in lowered("pallas").values():
        assert len(re.findall(r"@__gpu\$xla.gpu.triton\(", text)) == CONFIG["num_hidden_layers"]
        assert not re.search(r"stablehlo.gather[^\n]*: \(tensor<333x", text)
    for text in lowered("pallas", model_type="gemma2", num_key_value_heads=4).values():  # with a soft cap
        assert len(re.findall(r"@__gpu\$xla.gpu.triton\(", text)) == CONFIG["num_hidden_layers"]
    for text in lowered("xla").values():
        assert "triton" not in text
        assert re.search(r"stablehlo.gather[^\n]*: \(tensor<333x", text)


# In a process of its own, with XLA's compiler for a GPU that is not there: an L4, which has the least shared memory.
SCRIPT = """
import json, re, sys
from jax.experimental import topologies
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.programs import Programs
from jaxinfer.models.model import AbstractModel

L4 = '''
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 1536 core_count: 58 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 cuda_compute_capability { major: 8 minor: 9 }
  memory_bandwidth: 300000000000 l2_cache_size: 50331648 clock_rate_ghz: 2.04 device_memory_size: 23000000000
  runtime_version: "12.8.0" driver_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA L4"
'''
device = topologies.get_topology_desc(platform="cuda", target_config=L4, topology="1x1x1").devices[0]
for config in json.loads(sys.argv[1]):
    programs = Programs(
        AbstractModel.from_config(config, "bfloat16"), device, Buckets.make(8, 256), num_pages=1025, page_size=16,
        max_model_len=1024, max_rows=8, max_steps=4, attention="pallas",
    )
    for key in (("decode", 8), ("forward", 256)):
        compiled = programs[key].lower().compile()
        text, cache = compiled.as_text(), programs.state.cache
        print(json.dumps({
            "kernels": len(re.findall('custom_call_target="__gpu.xla.gpu.triton"', text)),
            "copied": re.findall(r"= bf16\\[1025,[\\d,]*\\]\\S* copy(?:-start)?\\(", text),
            "aliased": compiled.memory_analysis().alias_size_in_bytes,
            "cache": sum(pool.size * pool.dtype.itemsize for layer in cache for pool in layer),
        }))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not any(entry.name.startswith("xla_cuda") for entry in entry_points(group="jax_plugins")),
    reason="the compiler for GPUs comes with jax[cuda13]",
)
def test_compiled_for_a_gpu():
    """The largest head size and the usual one: the kernel's blocks fit, the pool is aliased, and nowhere copied."""
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}
    configs = [CONFIG | {"head_dim": 128}, CONFIG | {"head_dim": 256, "model_type": "gemma2"}]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(configs)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 4
    for figures in lines:
        assert figures["kernels"] == CONFIG["num_hidden_layers"]
        assert not figures["copied"]
        assert figures["aliased"] >= figures["cache"]


@pytest.mark.slow
@pytest.mark.usefixtures("_allowed")
def test_the_same_tokens(checkpoints, monkeypatch):
    """As in plain XLA, with rows and heads split: prompts of several chunks, and rows that decode beside them."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    prompts = [list(range(3, 3 + length)) for length in (5, 90, 33, 1)]
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "mesh": "data=2,tensor=2"}
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    tokens = []
    for attention, kind in (("pallas", type(GPU)), ("xla", XLAAttention)):
        with LLM(checkpoints("llama").folder, attention=attention, **options) as llm:
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
            tokens.append([output.outputs[0].token_ids for output in outputs])
            assert isinstance(llm.engine.runner.programs.layer_map.backends[0], kind)
    assert tokens[0] == tokens[1]


def test_refused_on_a_cpu(cli):
    with pytest.raises(ValueError, match="attention is 'pallas': kernels are for TPUs and for NVIDIA GPUs"):
        LLM(MODEL_DIR, attention="pallas")
    assert "attention is 'pallas'" in cli("generate", "--attention", "pallas", "Hello").error()
    with pytest.raises(ValueError, match="attention is 'cudnn': it must be one of auto, xla, pallas"):
        LLM(MODEL_DIR, attention="cudnn")
