"""Quantized models from end to end: as the weights that they stand for, on one device and on several."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer import LLM, SamplingParams
from jaxinfer.demo import MODEL_DIR
from jaxinfer.demo.evaluate import ask
from jaxinfer.demo.questions import held_out_questions
from jaxinfer.engine.load import local_programs
from jaxinfer.models.model import AbstractModel
from jaxinfer.plan.ship import ship
from jaxinfer.quantization.schemes import parse_quantization
from tests.plain import CONFIG, random_tensors, write_checkpoint

OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 8}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPTS = [[5, 17, 200, 33], [90, 2, 71], list(range(40, 100))]
LARGEST = {"int8": 127, "fp8": 448}


def rounded(weight, scheme):
    """What is left of a weight, by arithmetic of its own: integers, or floats of three bits and a half."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(LARGEST[scheme])
    scaled = weight / scale
    if scheme == "fp8":
        step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 1e-30))), -6) - 3)
        return (np.round(scaled / step) * step * scale).astype(np.float32)
    return (np.round(scaled) * scale).astype(np.float32)


@pytest.fixture(scope="module")
def dequantized(checkpoints, tmp_path_factory):
    """A checkpoint whose matrices are what a scheme makes of them."""

    def make(name, scheme):
        folder = tmp_path_factory.mktemp(f"{name}-{scheme}") / "model"
        shutil.copytree(checkpoints(name).folder, folder)
        tensors = load_file(folder / "model.safetensors")
        for key, value in tensors.items():
            if value.ndim == 2 and not any(table in key for table in ("embed", "wte", "wpe")):
                stored_in_out = "c_attn" in key or "c_proj" in key or "c_fc" in key
                tensors[key] = np.ascontiguousarray(
                    rounded(value.T, scheme).T if stored_in_out else rounded(value, scheme)
                )
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("llama", "int8"),
        pytest.param("gpt2", "int8", marks=pytest.mark.slow),
        pytest.param("qwen2", "fp8", marks=pytest.mark.slow),
    ],
)
def test_as_the_weights_that_it_stands_for(checkpoints, dequantized, name, scheme):
    with LLM(checkpoints(name).folder, quantization=scheme, **OPTIONS) as llm:
        got, scored = llm.generate(PROMPTS, GREEDY), llm.score(PROMPTS)
        assert f"in {scheme}, float32" in llm.description
    with LLM(dequantized(name, scheme), **OPTIONS) as llm:
        expected = llm.score(PROMPTS)
        same = llm.generate(PROMPTS, GREEDY)
    for score, other in zip(scored, expected, strict=True):
        np.testing.assert_allclose(score.logprobs, other.logprobs, atol=2e-5)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in same]


@pytest.mark.parametrize(
    ("scheme", "mesh"),
    [
        pytest.param("int8", "data=2,fsdp=2,tensor=2", marks=pytest.mark.long),
        pytest.param("int8", "tensor=4", marks=pytest.mark.long),
        pytest.param("fp8", "fsdp=8", marks=pytest.mark.long),
        pytest.param("int8-w8a8", "fsdp=2,tensor=4", marks=pytest.mark.slow),
    ],
)
def test_the_same_on_several_devices(checkpoints, scheme, mesh):
    results = []
    for spec in (None, mesh):
        with LLM(checkpoints("llama").folder, quantization=scheme, mesh=spec, **OPTIONS) as llm:
            results.append(([o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)], llm.score(PROMPTS)))
            params = llm.engine.runner.params
    (alone, scores), (split, others) = results
    assert alone == split
    for score, other in zip(scores, others, strict=True):
        np.testing.assert_allclose(score.logprobs, other.logprobs, atol=3e-5)
    weight, scales = (params[f"model.layers.0.mlp.up_proj.weight{end}"] for end in ("", "_scale"))
    assert (weight.dtype.itemsize, scales.dtype) == (1, np.float32)
    assert weight.sharding.shard_shape(weight.shape)[0] == scales.sharding.shard_shape(scales.shape)[0]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param("int8", None, marks=pytest.mark.slow),
        pytest.param("int8", "data=2,fsdp=2,tensor=2", marks=pytest.mark.slow),
        pytest.param("fp8", "tensor=2", marks=pytest.mark.long),
    ],
)
def test_a_quantized_cache(checkpoints, name, mesh):
    """The same tokens alone, and in company, from shared pages, some computed again, on several devices."""
    folder, few = checkpoints("llama").folder, {"kv_cache_memory": 16 * 8 * 2 * 2 * 2 * (8 + 4)}  # 16 pages
    prompts = [*PROMPTS, [*PROMPTS[2][:48], 7, 8]]
    with LLM(folder, kv_cache_dtype=name, **OPTIONS, max_model_len=96) as llm:
        alone = [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in prompts]
        assert llm.engine.runner.programs.layout.bytes_per_token == 2 * 2 * 2 * (8 + 4)
        assert f"in {'int8' if name == 'int8' else 'float8_e4m3fn'} for" in llm.description
        score = llm.score(PROMPTS[2:])[0].logprobs
    with LLM(folder, kv_cache_dtype=name, mesh=mesh, **OPTIONS | few, max_model_len=96) as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)] == alone
        assert mesh is not None or llm.stats.preemptions > 0
    with LLM(folder, **OPTIONS) as llm:
        expected = llm.score(PROMPTS[2:])[0].logprobs
    off = np.abs(np.subtract(score, expected)).mean()
    assert 1e-5 < off < {"int8": 0.05, "fp8": 0.3}[name]


def of_blocks(weight, scheme):
    """What is left of a weight in a scheme whose scales are of groups or blocks, by arithmetic of its own."""
    rows, columns = weight.shape
    high, wide = {"int4": (1, 32), "int4-g128": (1, 128), "fp8-block": (128, 128)}[scheme]
    result = np.empty_like(weight)
    for i in range(0, rows, high):
        for j in range(0, columns, wide):
            block = weight[i : i + high, j : j + wide]
            if scheme == "fp8-block":
                result[i : i + high, j : j + wide] = rounded(block.reshape(1, -1), "fp8").reshape(block.shape)
            else:
                scale = np.abs(block).max() / np.float32(7)
                result[i : i + high, j : j + wide] = np.round(block / scale) * scale
    return result


@pytest.mark.parametrize(
    ("scheme", "mesh"),
    [
        pytest.param("int4", "data=2,fsdp=2,tensor=2", marks=pytest.mark.slow),
        pytest.param("int4-g128", "fsdp=2,tensor=2", marks=pytest.mark.long),
        pytest.param("fp8-block", "data=2,fsdp=2,tensor=2", marks=pytest.mark.slow),
    ],
)
def test_schemes_with_blocks(tmp_path, scheme, mesh):
    """As the weights that they stand for, with blocks that the mesh keeps whole: MLP and vocabulary are padded."""
    tensors = random_tensors(CONFIG)
    left = {
        name: of_blocks(tensor, scheme) if tensor.ndim == 2 and "embed" not in name else tensor
        for name, tensor in tensors.items()
    }
    with LLM(write_checkpoint(tmp_path / "left", CONFIG, left), **OPTIONS) as llm:
        expected = llm.score(PROMPTS)
    with LLM(write_checkpoint(tmp_path / "m", CONFIG, tensors), quantization=scheme, mesh=mesh, **OPTIONS) as llm:
        got = llm.score(PROMPTS)
        params = llm.engine.runner.params
    for score, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(score.logprobs, other.logprobs, atol=1e-4)
    weight, scales = (params[f"model.layers.0.mlp.down_proj.weight{end}"] for end in ("", "_scale"))
    assert (weight.dtype.itemsize, scales.dtype) == (1, np.float32)
    size, parts = {"int4": (32, 2), "int4-g128": (128, 2)}.get(scheme, (128, 1))
    whole, split = weight.sharding.shard_shape(weight.shape), scales.sharding.shard_shape(scales.shape)
    assert whole[1] * parts == split[1] * size, "each part has whole blocks"


@pytest.mark.parametrize(
    ("scheme", "mesh", "changed", "what"),
    [
        ("int4-g128", "fsdp=4", {}, "its 256 inputs would be split into 4 parts .* 128 have one scale; .* 1, 2 parts"),
        ("fp8-block", "tensor=4", {"head_dim": 64}, "k_proj.weight: its 128 outputs .* 2 parts .* 1 parts"),
    ],
)
def test_blocks_that_do_not_divide(tmp_path, scheme, mesh, changed, what):
    config = CONFIG | changed
    folder = write_checkpoint(tmp_path / "m", config, random_tensors(config))
    with pytest.raises(ValueError, match=what):
        LLM(folder, quantization=scheme, mesh=mesh, **OPTIONS)


def test_what_groups_do_not_divide_is_left_as_it_is(caplog, tmp_path):
    """And said, with why; patterns are no different. Only where nothing is left to quantize that is an error."""
    config = CONFIG | {"intermediate_size": 40}
    reason = "is left in float32: groups of 32 don't divide the 40 inputs, as int4 needs"
    for quantization in ("int4", {"*.mlp.*": "int4"}):
        caplog.clear()
        with caplog.at_level("WARNING", "jaxinfer"):
            model = AbstractModel.from_config(config, "float32", quantization)
        assert caplog.messages == [f"quantization is {quantization!r}: model.layers.*.mlp.down_proj.weight {reason}"]
        assert model.abstract["model.layers.0.mlp.down_proj.weight"].dtype == np.float32
        assert model.abstract["model.layers.0.mlp.up_proj.weight"].dtype == np.uint8
    with pytest.raises(
        ValueError, match=r"none of the model's weights is meant by it; groups of 32 don't divide the 40"
    ):
        AbstractModel.from_config(config, "float32", {"*.down_proj.*": "int4"})
    tensors = random_tensors(config)
    folder = write_checkpoint(tmp_path / "m", config, tensors)
    with LLM(folder, quantization="int4", **OPTIONS) as llm:
        params = llm.engine.runner.params
        name = "model.layers.1.mlp.down_proj.weight"
        np.testing.assert_array_equal(np.asarray(params[name], np.float32), np.asarray(tensors[name], np.float32))
        (scored,) = llm.score([PROMPTS[0]], use_tqdm=False)
    assert np.isfinite(scored.logprob)


@pytest.mark.slow
def test_tables_with_blocks(tmp_path):
    """Rows of a table, and a tied head: one weight, looked up and multiplied with."""
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = random_tensors(config)
    folder = write_checkpoint(tmp_path / "m", config, tensors)
    table = "model.embed_tokens.weight"
    left = write_checkpoint(tmp_path / "left", config, tensors | {table: of_blocks(tensors[table], "int4")})
    scores = []
    for model, options in ((left, {}), (folder, {"quantization": {"*.embed_tokens.*": "int4"}, "mesh": "tensor=2"})):
        with LLM(model, **OPTIONS, **options) as llm:
            scores.append(llm.score(PROMPTS))
    for score, other in zip(*scores, strict=True):
        np.testing.assert_allclose(score.logprobs, other.logprobs, atol=1e-4)


def test_patterns(checkpoints):
    """The embedding too, and the head not: which weights are in what."""
    rules = {"*.mlp.*": "fp8", "*.k_proj.*": "none", "lm_head.*": "none", "*": "int8"}
    with LLM(checkpoints("llama").folder, quantization=rules, **OPTIONS) as llm:
        kinds = {name: str(array.dtype) for name, array in llm.engine.runner.params.items()}
        (output,) = llm.generate([PROMPTS[0]], GREEDY)
    assert len(output.outputs[0].token_ids) == 24
    layer = "model.layers.1"
    assert kinds[f"{layer}.mlp.down_proj.weight"] == "float8_e4m3fn"
    assert kinds[f"{layer}.self_attn.q_proj.weight"] == "int8"
    assert kinds[f"{layer}.self_attn.k_proj.weight"] == kinds["lm_head.weight"] == "float32"
    assert kinds["model.embed_tokens.weight"] == "int8"
    assert f"{layer}.self_attn.k_proj.weight_scale" not in kinds


@pytest.mark.slow
def test_compiled_ahead(checkpoints, tmp_path, caplog):
    """What was compiled for a scheme is for that scheme, which goes without saying then."""
    folder = checkpoints("llama").folder
    options = OPTIONS | {"max_model_len": 64, "quantization": "int8"}
    ship(*local_programs(json.loads((folder / "config.json").read_text()), options), str(tmp_path / "p"), lambda: None)
    with LLM(folder, **options) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(PROMPTS[:2], GREEDY)]
    with LLM(folder, compiled=tmp_path / "p") as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS[:2], GREEDY)] == expected
        assert llm.engine.runner.compilations == 0
        assert llm.engine.runner.params["lm_head.weight"].dtype == np.int8
    with LLM(folder, compiled=tmp_path / "p", quantization="fp8"):
        assert "option quantization was 'int8' and is 'fp8'" in caplog.text


SHAPE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("quantization", "most"),
    [
        ("int8", 0.55),
        ("fp8-block", 0.55),
        ({"*": "int8"}, 0.505),
        ({"*": "fp8-block"}, 0.505),
        ({"*": "int4"}, 0.32),
        ({"*": "int4-g128"}, 0.29),
    ],
)
def test_bytes_of_weights(quantization, most):
    """Of those in bfloat16. The embedding, which a name leaves alone, is 9.5% of this model."""

    def size(model):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(dict(model.abstract)))

    share = size(AbstractModel.from_config(SHAPE, "bfloat16", quantization)) / size(
        AbstractModel.from_config(SHAPE, "bfloat16")
    )
    assert most * 0.9 < share < most


def test_bad_input(checkpoints, cli):
    folder = checkpoints("llama").folder
    with pytest.raises(
        ValueError, match=r"quantization is 'int3': it must be one of int8, .*int4, .*fp8-block, or patterns"
    ):
        LLM(folder, quantization="int3")
    with pytest.raises(ValueError, match="none of the model's weights is meant by it"):
        LLM(folder, quantization={"*.experts.*": "int8"})
    assert "quantization is 'int3'" in cli("generate", "x", "-m", folder, "--quantization", "int3").error()
    for wrong, problem in {
        "*.mlp.*=int3": "it must be one of int8, ",
        "int8,*=int4": "'int8' must be PATTERN=SCHEME",
        "=int8": "'=int8' must be PATTERN=SCHEME",
        "*=int8,*=int4": "each pattern once",
    }.items():
        assert problem in cli("generate", "x", "-m", folder, "--quantization", wrong).error()


def test_patterns_on_the_command_line(cli, checkpoints):
    assert parse_quantization("int4-g128") == "int4-g128"
    assert parse_quantization("*.mlp.*=int8, *=none") == {"*.mlp.*": "int8", "*": "none"}
    folder = checkpoints("llama").folder
    options = ["-m", folder, "--quantization", "*.mlp.*=int8,*=none", "--max-model-len", 64]
    assert json.loads(cli("doctor", "--json", *options).out)["the model's precision"] == "int8, float32"


@pytest.mark.slow
def test_what_it_costs():
    """Right answers of the packaged model, in points of a hundred, on the same held-out questions."""
    questions = held_out_questions(600, 1)

    def right(quantization):
        with LLM(MODEL_DIR, quantization=quantization) as llm:
            return 100 * np.mean(ask(llm, questions))

    unquantized = right(None)
    for scheme, points in (("int8", 0.5), ("int8-w8a8", 1.0), ("fp8", 1.0), ("fp8-block", 1.0), ("int4", 3.0)):
        assert unquantized - right(scheme) <= points, scheme
