"""A family that the package does not know goes through all of it."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxinfer import LLM, SamplingParams
from jaxinfer.calibrate import calibrate
from jaxinfer.convert import convert
from jaxinfer.engine.load import local_programs
from jaxinfer.models import registry
from jaxinfer.plan.compile import make_plan
from jaxinfer.plan.figures import figures
from jaxinfer.plan.fit import fit_config
from jaxinfer.plan.ship import ship
from jaxinfer.plan.targets import find_target
from tests.engine.reference import all_logits, same
from tests.outside.family import ARCHITECTURE, EXPERTS, INNER, NAME, TYPE, WIDTH, write

KINDS = {
    "pages": ("latent", "latent 20", "nothing", "heads"),
    "state": ("sum", "heads", "latent"),
}
POOLS = {"pages": 2, "state": 2}  # latents of all tokens and of some share arrays
LENGTH, NEW = 128, 20
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 4, "max_model_len": LENGTH, "dtype": "float32"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
RNG = np.random.default_rng(1)
SHARED = RNG.integers(0, 256, 60).tolist()
PROMPTS = [SHARED[: 12 * i] + RNG.integers(0, 256, 1 + 5 * i).tolist() for i in range(6)]


@pytest.fixture(scope="module", autouse=True)
def registered():
    before = dict(registry.REGISTRY)
    registry.register(NAME, TYPE, ARCHITECTURE, "a family from outside")
    yield
    registry.REGISTRY.clear()
    registry.REGISTRY.update(before)


@pytest.fixture(scope="module")
def folders(registered, tmp_path_factory):
    top = tmp_path_factory.mktemp("outside")
    return {name: write(top / name, *kinds) for name, kinds in KINDS.items()}


def generated(llm, prompts=PROMPTS, params=GREEDY):
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def check(llm, prompts=PROMPTS, params=GREEDY):
    """The tokens are those of a forward over the whole sequence, with the weights that are loaded and no cache."""
    for prompt, tokens in zip(prompts, generated(llm, prompts, params), strict=True):
        values = all_logits(llm, prompt + tokens, LENGTH)[len(prompt) - 1 : -1]
        gaps = np.diff(np.sort(values, axis=-1)[:, -2:], axis=-1)[:, 0]
        assert same(tokens, values.argmax(axis=-1).tolist(), gaps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pages", "state"])
def test_with_prefix_hits_and_preemption(folders, name):
    """There is room for less than two sequences. Pages are found again, and states."""
    with LLM(folders[name], kv_cache_memory=2**20, **OPTIONS) as probe:
        each = probe.sizes.bytes
        assert len(probe.engine.runner.programs.layout.pools) == POOLS[name]
        held = jax.tree.leaves(probe.engine.runner.state.cache)
        assert sum(array.size * array.dtype.itemsize for array in held) == each
        check(probe)
        check(probe)
        assert probe.stats.hit_tokens > 0
        assert probe.stats.preemptions == 0
    with LLM(folders[name], kv_cache_memory=int(each * 0.4), **OPTIONS) as llm:
        check(llm, [prompt[-3:] for prompt in PROMPTS], replace(GREEDY, max_tokens=90))
        assert llm.stats.preemptions > 0
        assert llm.stats.pages_used == 0


def test_states_alone_and_nothing_at_all(tmp_path):
    with LLM(write(tmp_path / "states", "sum", "sum"), **OPTIONS) as llm:
        assert not llm.engine.runner.programs.layout.pools
        check(llm, PROMPTS[:2])
    with pytest.raises(ValueError, match="no layer of the model keeps anything of a sequence"):
        LLM(write(tmp_path / "nothing", "nothing"), **OPTIONS)


def test_a_dtype_that_its_cache_can_not_have(folders):
    with pytest.raises(ValueError, match=r"kv_cache_dtype is 'int8': .*this model.*; leave it out"):
        LLM(folders["state"], kv_cache_dtype="int8", **OPTIONS)


@pytest.mark.parametrize(("name", "scheme"), [("pages", "int8"), ("state", "int4")])
def test_quantized(folders, name, scheme):
    with LLM(folders[name], quantization=scheme, **OPTIONS) as llm:
        spec = llm.model.params["layers.0.experts.up"]
        assert spec.scheme.name == scheme
        assert llm.engine.runner.params["layers.0.experts.up_scale"].shape == spec.arrays["_scale"].shape
        check(llm, PROMPTS[:3])


@pytest.mark.parametrize(
    ("mesh", "scheme"),
    [
        ("tensor=2", None),
        pytest.param("data=2", None, marks=pytest.mark.slow),
        pytest.param("fsdp=2,tensor=2", "int8", marks=pytest.mark.slow),
        pytest.param("fsdp=2,tensor=2", None, marks=pytest.mark.long),
        pytest.param("tensor=2", "int8", marks=pytest.mark.long),
    ],
)
def test_on_a_mesh(folders, mesh, scheme):
    with LLM(folders["state"], mesh=mesh, quantization=scheme, **OPTIONS) as llm:
        up = llm.engine.runner.params["layers.0.experts.up"]
        rows = INNER // 2 if "tensor" in mesh else INNER
        columns = WIDTH // 2 if "fsdp" in mesh else WIDTH
        assert up.sharding.shard_shape(up.shape) == (EXPERTS, rows, columns)
        split = generated(llm, PROMPTS[:3])
    with LLM(folders["state"], quantization=scheme, **OPTIONS) as llm:
        for prompt, tokens in zip(PROMPTS, split, strict=False):
            values = all_logits(llm, prompt + tokens, LENGTH)[len(prompt) - 1 : -1]
            gaps = np.diff(np.sort(values, axis=-1)[:, -2:], axis=-1)[:, 0]
            assert same(tokens, values.argmax(axis=-1).tolist(), gaps)


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_to_orbax_and_to_hf_and_back(folders, tmp_path, scheme):
    with LLM(folders["state"], quantization=scheme, **OPTIONS) as llm:
        expected = generated(llm, PROMPTS[:3])
    for form in ("orbax", "hf"):
        convert(folders["state"], tmp_path / form, format=form, quantization=scheme, show_progress=False)
        with LLM(tmp_path / form, **OPTIONS) as llm:
            assert generated(llm, PROMPTS[:3]) == expected
    written = load_file(tmp_path / "hf" / "model.safetensors")
    if scheme is None:
        original = load_file(folders["state"] / "model.safetensors")
        assert written.keys() == original.keys()
        assert all(np.array_equal(written[name], original[name]) for name in original)
    else:
        assert written["layers.0.experts.1.up.weight_packed"].shape == (INNER, WIDTH // 4)


@pytest.mark.parametrize("method", ["gptq", pytest.param("awq", marks=pytest.mark.slow)])
def test_calibrated(folders, tmp_path, method):
    """Two kinds of layers, and experts that do not say what goes into them, so they are rounded to the nearest."""
    texts = ["".join(map(chr, RNG.integers(40, 90, 60))) for _ in range(4)]
    outputs = {}
    for form in ("orbax", "hf"):
        calibrate(
            folders["state"], tmp_path / form, texts, scheme="int4", method=method, format=form, show_progress=False
        )
        with LLM(tmp_path / form, **OPTIONS) as llm:
            assert set(llm.model.quantized) > {"layers.0.experts.up", "layers.0.mixer.into.weight"}
            check(llm, PROMPTS[:2])
            outputs[form] = generated(llm, PROMPTS[:2])
    assert outputs["orbax"] == outputs["hf"]


def test_planned(folders):
    config = json.loads((folders["state"] / "config.json").read_text())
    plan = make_plan(fit_config(config, find_target("v5e-4", compiles=False), max_model_len=LENGTH, max_num_seqs=4))
    seen = figures(plan, LENGTH)
    assert seen["bytes"]["cache"] > 0
    assert seen["decode"][0]["flops"] > 0


@pytest.mark.slow
def test_compiled_for_a_slice(folders):
    pytest.importorskip("libtpu")
    config = json.loads((folders["state"] / "config.json").read_text())
    sizes = {"max_model_len": LENGTH, "max_num_seqs": 4, "max_num_batched_tokens": 32}
    plan = make_plan(fit_config(config, find_target("v5e-4"), quantization="int8", **sizes))
    assert [program.key[0] for program in plan.programs] == ["full_decode", "forward", "full_sample", "score"]


def test_compiled_ahead(folders, tmp_path):
    config = json.loads((folders["state"] / "config.json").read_text())
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "max_model_len": 64, "page_size": 8, "dtype": "float32"}
    with jax.default_device(jax.devices()[0]):
        ship(*local_programs(config, sizes), str(tmp_path / "programs"), lambda: None)
    with LLM(folders["state"], compiled=tmp_path / "programs") as llm:
        assert generated(llm, [PROMPTS[0]])[0]
        assert llm.engine.runner.compilations == 0
