"""The engine with the kernel for GPUs: its programs lowered for CUDA, without a GPU, and interpreted on a CPU."""

import functools
import re

import jax
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType

from jaxinfer import LLM, SamplingParams
from jaxinfer.cache import pages
from jaxinfer.demo import MODEL_DIR
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.programs import Programs
from jaxinfer.engine.step import make_decode, make_step
from jaxinfer.models.model import Model

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
    monkeypatch.setattr(pages, "_problem", lambda *_: None)


def lowered(attention: str) -> dict[str, str]:
    """Both programs' text for CUDA."""
    model = Model.from_config(CONFIG, "bfloat16")
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
    made = {"decode": make_decode(model, 4), "step": make_step(model)}
    # Newer JAX asks which GPU it is for; older takes a Hopper where there is none.
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("all",), axis_types=(AxisType.Auto,), abstract_device=device)
    found = {}
    for key in (("decode", 8, 8), ("step", 64, 8)):
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(made[key[0]], donate_argnums=1).trace(*programs.arguments(key))
        found[key[0]] = traced.lower(lowering_platforms=("cuda",)).as_text()
    return found


@pytest.mark.usefixtures("_allowed")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_lowered_for_cuda():
    """The kernel in each layer of both programs, and no pages are gathered; which they are in plain XLA."""
    for text in lowered("pallas").values():
        assert len(re.findall(r"@__gpu\$xla.gpu.triton\(", text)) == CONFIG["num_hidden_layers"]
        assert not re.search(r"stablehlo.gather[^\n]*: \(tensor<333x", text)
    for text in lowered("xla").values():
        assert "triton" not in text
        assert re.search(r"stablehlo.gather[^\n]*: \(tensor<333x", text)


@pytest.mark.slow
@pytest.mark.usefixtures("_allowed")
def test_the_same_tokens(checkpoints, monkeypatch):
    """As in plain XLA, with rows and heads split: prompts of several chunks, and rows that decode beside them."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    prompts = [list(range(3, 3 + length)) for length in (5, 90, 33, 1)]
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "mesh": "data=2,tensor=2"}
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    found = []
    for attention, kind in (("pallas", pages.GpuPages), ("xla", pages.SplitPages)):
        with LLM(checkpoints("llama").folder, attention=attention, **options) as llm:
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
            found.append([output.outputs[0].token_ids for output in outputs])
            assert isinstance(llm.engine.runner.programs.state.cache[0], kind)
    assert found[0] == found[1]


def test_refused_on_a_cpu(cli):
    with pytest.raises(ValueError, match="attention is 'pallas': kernels are for TPUs and for NVIDIA GPUs"):
        LLM(MODEL_DIR, attention="pallas")
    assert "attention is 'pallas'" in cli("generate", "--attention", "pallas", "Hello").error()
    with pytest.raises(ValueError, match="attention is 'cudnn': it must be one of auto, xla, pallas"):
        LLM(MODEL_DIR, attention="cudnn")
