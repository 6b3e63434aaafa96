"""What can be done with a checkpoint, once for each layout that its tensors may have."""

import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer import LLM, SamplingParams
from jaxinfer.attention import ForwardBatch
from jaxinfer.calibrate import calibrate, fold
from jaxinfer.checkpoint.factors import read_adapter
from jaxinfer.checkpoint.hf import HfWriter
from jaxinfer.checkpoint.open import load_weights, open_weights
from jaxinfer.convert import convert
from jaxinfer.engine.load import local_programs
from jaxinfer.engine.sizing import device_bytes
from jaxinfer.layerwise import Layers
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.sources import whole
from jaxinfer.plan.fit import fit, model_of
from jaxinfer.plan.ship import ship
from jaxinfer.plan.targets import find_target
from jaxinfer.quantization.quantize import quantize
from jaxinfer.sharding import make_mesh
from jaxinfer.text.tokenizer import load_tokenizer
from tests.checkpoint.formats import CASES
from tests.checkpoint.test_quantized import check
from tests.plain import random_tensors, write_checkpoint

BASE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
GLM = {"model_type": "glm", "head_dim": 16, "attention_bias": True}
MISTRAL = BASE | {"model_type": "mistral", "sliding_window": None, "head_dim": 16}
TURNS = "experts in one tensor, gates and ups by turns, with biases"
TURNED = "experts in one tensor, the other way round"
PACKED = "experts of shares of inputs, in one tensor"
DELTA_NETS = "delta nets, of which each head of keys has its rows of one tensor, and gated attention"
MAMBA = "Mamba-2, whose projections are in one tensor, beside attention"
CONVOLUTIONS = "short convolutions beside attention"
BOTH = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
LAYOUTS = {
    "fused qkv, and gates": BASE | {"model_type": "phi3"},
    "fused gates": BASE | GLM,
    "heads' q, k and v by turns": BASE | {"model_type": "gpt_neox", "num_key_value_heads": None},
    "names of GPT-2, biases": BASE | {"model_type": "starcoder2"},
    "norms of heads": BASE | {"model_type": "qwen3", "head_dim": 16},
    "norms of heads, each with weights": BASE | {"model_type": "cohere", "use_qk_norm": True},
    "the same in tensors of their own": BASE
    | {"model_type": "stablelm", "qk_layernorm": True, "use_parallel_residual": True},
    "norms over all heads": BASE | {"model_type": "olmo2"},
    "norms without weights": BASE | {"model_type": "olmo", "clip_qkv": 0.5},
    "four norms a layer, tied": BASE
    | {"model_type": "gemma2", "head_dim": 16, "sliding_window": 16, "tie_word_embeddings": True},
    "a head with a bias": BASE | {"model_type": "phi", "num_key_value_heads": 4},
    "learned positions": BASE | {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 128},
    "experts": BASE
    | {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 2,
        "mlp_only_layers": [0],
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 64,
    },
    TURNS: BASE
    | {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "sliding_window": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default"},
    },
    TURNED: {
        "model_type": "qwen3_vl_moe",
        "text_config": BASE
        | {
            "model_type": "qwen3_vl_moe_text",
            "head_dim": 16,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
        },
        "tie_word_embeddings": False,
    },
    PACKED: BASE
    | {
        "model_type": "llama4_text",
        "num_hidden_layers": 2,
        "head_dim": 16,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 64,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 16,
    },
    "heads of two sizes, one of them alone, keys as values, and caches that others read": BASE
    | {
        "model_type": "gemma4_text",
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 16,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 1,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": 300,
    },
    DELTA_NETS: BASE
    | BOTH
    | {
        "model_type": "qwen3_next",
        "mlp_only_layers": [0, 1],
        "head_dim": 16,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    MAMBA: BASE
    | BOTH
    | {
        "model_type": "granitemoehybrid",
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "residual_multiplier": 0.5,
    },
    CONVOLUTIONS: BASE
    | {
        "model_type": "lfm2",
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "wrapped": {
        "model_type": "mistral3",
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": MISTRAL,
        "tie_word_embeddings": False,
    },
}
GATES = ("gate", "shared_expert_gate")
slow, long = (partial(pytest.param, marks=mark) for mark in (pytest.mark.slow, pytest.mark.long))
RARE = {name: slow(name) for name in (TURNED, DELTA_NETS, MAMBA)} | {CONVOLUTIONS: long(CONVOLUTIONS)}
every = pytest.mark.parametrize("layout", [RARE.get(name, name) for name in LAYOUTS])
# Those whose matrices lie as linears of others do; of TURNS there is a format of its own, see test_gpt_oss.
linears = pytest.mark.parametrize(
    "layout", [RARE.get(name, name) for name in LAYOUTS if name not in (TURNS, TURNED, PACKED)]
)
# Where engines are made, or models calibrated, which takes seconds.
SELDOM = [long(name) if name in (MAMBA, CONVOLUTIONS) else slow(name) for name in LAYOUTS]
seldom = pytest.mark.parametrize("layout", SELDOM)
PROMPT = np.random.default_rng(3).integers(0, 256, 40).tolist()
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "page_size": 8, "max_model_len": 64, "dtype": "float32"}


@cache
def tensors(layout):
    return random_tensors(LAYOUTS[layout])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("layouts")

    @cache
    def of(layout):
        return write_checkpoint(top / str(list(LAYOUTS).index(layout)), LAYOUTS[layout], tensors(layout))

    return of


def loaded(folder, placement=None, **options):
    """A checkpoint's model and parameters, in whichever form it is."""
    config = json.loads((folder / "config.json").read_text())
    model = AbstractModel.from_config(config, "float32", **options)
    with open_weights(folder) as weights:
        return model, load_weights(model, weights, placement or jax.devices()[0])


@pytest.fixture(scope="module")
def plain(folders):
    """A layout's model and parameters, in float32, and the logits that such parameters give."""

    @cache
    def of(layout):
        model, params = loaded(folders(layout))
        run = jax.jit(lambda params, batch: model.bind(params)(batch, None)[0])
        return model, params, lambda params, tokens=PROMPT: np.asarray(run(params, batch_of(tokens)))[: len(tokens)]

    return of


def batch_of(tokens):
    return ForwardBatch.of_sequences([tokens], len(PROMPT))


def mesh_of(model, spec):
    config = model.config
    return make_mesh(spec, jax.devices(), config.num_heads, config.num_kv_heads, config.hidden_size)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype, name
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def logits(model, params, tokens):
    run = jax.jit(lambda params, batch: model.bind(params)(batch, None)[0])
    return np.asarray(run(params, batch_of(tokens)))[: len(tokens)]


def logprobs(values):
    """Of the prompt's tokens but the first."""
    return np.asarray(jax.nn.log_softmax(values))[np.arange(len(PROMPT) - 1), PROMPT[1:]]


@every
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_quantized_while_loading(folders, plain, layout, scheme):
    """Each matrix by itself, also where several are in one tensor; and the same on a mesh."""
    unquantized, floats, _ = plain(layout)
    model, params = loaded(folders(layout), quantization=scheme)
    assert {*model.quantized} == {name for name, spec in unquantized.params.items() if spec.is_embedding is False}
    for name, kind in model.quantized.items():
        values, scales = quantize(np.asarray(floats[name]), kind)
        np.testing.assert_array_equal(params[name], values, err_msg=name)
        np.testing.assert_array_equal(params[f"{name}_scale"], scales, err_msg=name)
    split = loaded(folders(layout), mesh_of(model, "fsdp=2,tensor=2"), quantization=scheme)[1]
    for name, array in model.abstract.items():
        real = tuple(map(slice, array.shape))
        np.testing.assert_array_equal(np.asarray(split[name])[real], params[name], err_msg=name)


@linears
@pytest.mark.parametrize("name", ["gptq with zero points", "awq", "int4"])
def test_stored_quantized(layout, name, tmp_path):
    case = CASES[name]
    field = "ignore" if "ignore" in case.config else "modules_to_not_convert"
    # A head, which has no values of its own in these, and a router and a gate, which nobody quantizes.
    names = ["embed_out", *(f"model.layers.1.mlp.{gate}" for gate in GATES if layout == "experts")]
    left_out = [*case.config.get(field, []), *names]
    check(LAYOUTS[layout], case._replace(config=case.config | {field: left_out}), tmp_path)


@every
@pytest.mark.parametrize("mesh", ["tensor=4", "fsdp=4", *(slow(mesh) for mesh in ("tensor=2", "data=2,tensor=2"))])
def test_split_over_meshes(folders, plain, layout, mesh):
    model, params, _ = plain(layout)
    split = loaded(folders(layout), mesh_of(model, mesh))[1]
    for name, array in params.items():
        np.testing.assert_array_equal(np.asarray(split[name])[tuple(map(slice, array.shape))], array, err_msg=name)


@every
def test_written_as_it_was(plain, layout, tmp_path):
    """The same tensors by the same names."""
    model, params, _ = plain(layout)
    with HfWriter(model, str(tmp_path)) as writer:
        writer.add(params)
    same(load_file(tmp_path / "model.safetensors"), tensors(layout))


@pytest.mark.slow
@every
def test_written_in_the_format_of_orbax(folders, layout, tmp_path):
    convert(folders(layout), tmp_path / "orbax", quantization="int8", show_progress=False)
    same(loaded(tmp_path / "orbax")[1], loaded(folders(layout), quantization="int8")[1])


@linears
@pytest.mark.parametrize("scheme", ["int4", slow("int8")])
def test_written_quantized(folders, layout, scheme, tmp_path):
    """The format of compressed-tensors, there and back."""
    convert(folders(layout), tmp_path / "hf", format="hf", quantization=scheme, show_progress=False)
    same(loaded(tmp_path / "hf")[1], loaded(folders(layout), quantization=scheme)[1])


class Weights:
    """As much of an engine as who reads an adapter asks."""

    def __init__(self, params):
        self.params = params

    def values(self, name):
        return np.asarray(self.params[name])

    def rows(self, name, ids):
        return self.values(name)[ids]


@pytest.mark.slow
@every
def test_adapters_beside_weights_are_merged_ones(folders, plain, layout, tmp_path):
    """Of every matrix, whatever else is in its tensor, of the table and the head."""
    model, params, run = plain(layout)
    random, tensors = np.random.default_rng(1), {}
    for name, spec in model.adaptable.items():
        turned = {region.tensor: region.transposed for region in spec.source.regions(whole(spec.shape))}
        for tensor, shape in spec.source.tensors(spec.shape).items():
            module, size = tensor.removesuffix(".weight"), shape[::-1] if turned[tensor] else shape
            ends = ("lora_A.weight", "lora_B.weight")
            if name == model.vocabulary[0]:
                ends, size = ("lora_embedding_A", "lora_embedding_B"), size[::-1]
            if len(size) == 2 and (name in params or name == model.vocabulary[0]):
                for end, own in zip(ends, ((3, size[1]), (size[0], 3)), strict=True):
                    tensors[f"base_model.model.{module}.{end}"] = random.normal(0, 0.1, own).astype(np.float32)
    (adapter := tmp_path / "adapter").mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": "all-linear"}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    read = read_adapter(adapter, model, 64, Weights(params))
    stacked = {name for name in read.factors if len(model.adaptable[name].shape) > 2}
    beside = {
        name: jax.tree.map(lambda array, axis=int(name in stacked): jnp.expand_dims(array, axis), own)
        for name, own in read.factors.items()
    }
    slot = jnp.where(jnp.arange(len(PROMPT)) % 5 == 4, 1, 0)  # one slot; some tokens have none

    @jax.jit
    def adapted(params, batch, slot):
        return model.bind(params, beside, slot)(batch, None)[0]

    ours = np.asarray(adapted(params, batch_of(PROMPT), jnp.zeros(len(PROMPT), jnp.int32)))
    convert(folders(layout), tmp_path / "merged", adapter=adapter, show_progress=False)
    theirs = logits(*loaded(tmp_path / "merged"), PROMPT)
    size = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * size)
    assert np.abs(ours - run(params)).max() > 1e-2 * size
    assert np.abs(np.asarray(adapted(params, batch_of(PROMPT), slot)) - ours).max() > 1e-3 * size
    np.testing.assert_allclose(adapted(params, batch_of(PROMPT), jnp.ones_like(slot)), run(params), atol=1e-5 * size)


def test_not_written_quantized(folders, tmp_path):
    """What is no linear has no form in it."""
    with pytest.raises(ValueError, match=r"experts\.down_proj.* is of experts that are stacked in .*use format orbax"):
        convert(folders(TURNED), tmp_path / "hf", format="hf", quantization="int8", show_progress=False)


@every
def test_smoothing_changes_nothing(plain, layout):
    """All pairs of a layer that feed each other, by factors that are far apart."""
    model, params, run = plain(layout)
    changed = {name: np.array(value) for name, value in params.items()}
    layers, config, rng = Layers(model, jax.devices()[0], [PROMPT]), model.config, np.random.default_rng(0)
    for prefix, feeds in zip(layers.prefixes, layers.feeds, strict=True):
        assert feeds
        for source, taking in feeds:
            shared, channels = None, params[f"{prefix}.{taking[0]}.weight"].shape[1]
            factors = rng.uniform(0.3, 3, channels).astype(np.float32)
            if channels != params[f"{prefix}.{source}.weight"].shape[0]:
                shared = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim
                factors = np.broadcast_to(factors.reshape(shared)[:, :1], shared).reshape(-1)
            fold(changed, f"{prefix}.{source}", [f"{prefix}.{path}" for path in taking], factors, shared)
    expected = run(params)
    np.testing.assert_allclose(run(changed), expected, atol=3e-5 * np.abs(expected).max())


@every
def test_planned(layout):
    """What a chip is to hold are the weights."""
    model = model_of(LAYOUTS[layout], "float32")
    held = fit(model, find_target("v5e-4", compiles=False), mesh="tensor=4", **OPTIONS)
    assert held.tensor == 4
    assert held.weights < device_bytes(model.abstract) < 4 * held.weights


@pytest.mark.parametrize("layout", [of for of in SELDOM if of.values[0] not in (TURNS, TURNED, PACKED)])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated(folders, plain, layout, method, tmp_path):
    """On what it was made with it is nearer to the model than rounding."""
    texts = ["".join(map(chr, np.random.default_rng(i).integers(32, 127, 40).tolist())) for i in range(8)]
    options = {"scheme": "int4", "method": method, "format": "orbax", "show_progress": False}
    done = calibrate(folders(layout), tmp_path / "new", texts, **options)
    assert done.texts == 8
    _, params, run = plain(layout)
    tokens = load_tokenizer(folders(layout)).encode(texts[0])[: len(PROMPT)]
    expected = run(params, tokens)
    off = [
        np.abs(logits(*found, tokens) - expected).mean()
        for found in (loaded(tmp_path / "new"), loaded(folders(layout), quantization="int4"))
    ]
    assert 0 < off[0] < off[1]


@seldom
@pytest.mark.parametrize("mesh", ["tensor=4", "fsdp=2,tensor=2"])
def test_scored_on_a_mesh(folders, plain, layout, mesh):
    _, params, run = plain(layout)
    expected = logprobs(run(params))
    with LLM(folders(layout), mesh=mesh, **OPTIONS) as llm:
        (scored,) = llm.score([PROMPT])
    np.testing.assert_allclose(scored.logprobs, expected, atol=2e-4)


@seldom
def test_beams(folders, plain, layout):
    """Those of whole forwards."""
    _, params, run = plain(layout)
    prompt = PROMPT[:9]
    beams = [([], 0.0)]
    for _ in range(3):
        longer = []
        for tokens, total in beams:
            values = np.asarray(jax.nn.log_softmax(run(params, prompt + tokens)[-1]))
            longer += [([*tokens, int(i)], total + float(values[i])) for i in np.argsort(values)[-2:]]
        beams = sorted(longer, key=lambda entry: -entry[1])[:2]
    with LLM(folders(layout), **OPTIONS) as llm:
        (found,) = llm.beam_search([prompt], beam_width=2, max_tokens=3, ignore_eos=True)
    assert [sequence.token_ids for sequence in found.sequences] == [tokens for tokens, _ in beams]


@seldom
def test_compiled_ahead(folders, layout, tmp_path):
    config = json.loads((folders(layout) / "config.json").read_text())
    ship(*local_programs(config, OPTIONS | {"max_num_seqs": 1}), str(tmp_path / "programs"), lambda: None)
    with LLM(folders(layout), compiled=tmp_path / "programs") as llm:
        llm.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
        assert llm.engine.runner.compilations == 0
