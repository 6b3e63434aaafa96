"""Low-rank adapters that peft has written, merged into their base: the log-probabilities of peft itself."""

import contextlib
import json
import shutil

import numpy as np
import pytest

from jaxinfer.checkpoint.adapter import Adapter
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.merged import MergedCheckpoint

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA, TIED = ("LlamaConfig", {}), ("LlamaConfig", {"tie_word_embeddings": True})
BIASED = ("LlamaConfig", {"attention_bias": True, "mlp_bias": True})
GPT2 = ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "tie_word_embeddings": True})
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
QWEN = ("Qwen3MoeConfig", EXPERTS | {"moe_intermediate_size": 12})
GPT_OSS = ("GptOssConfig", EXPERTS | {"intermediate_size": 16, "layer_types": ["full_attention", "sliding_attention"]})
MIXTRAL = ("MixtralConfig", EXPERTS)
BOTH = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}

# What of the format each shows; the base; what differs from PLAIN.
PLAIN = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}
FEW = {
    "plain": (LLAMA, {}),
    "dora": (LLAMA, {"use_dora": True, "use_rslora": True}),
    "patterns": (
        LLAMA,
        {"rank_pattern": {"q_proj": 2, r"layers.1.self_attn.v_proj": 4}, "alpha_pattern": {"q_proj": 3}},
    ),
    "tied, embedding": (TIED, {"target_modules": ["embed_tokens", "q_proj"]}),
    "Conv1D": (GPT2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "fused experts": (QWEN, BOTH),
}
MORE = {
    "all": (LLAMA, {"target_modules": "all-linear"}),
    "expression": (LLAMA, {"target_modules": r".*\.(q|k)_proj"}),
    "layers": (LLAMA, {"layers_to_transform": [1]}),
    "named layers": (LLAMA, {"layers_to_transform": 1, "layers_pattern": "layers"}),
    "excluded": (LLAMA, {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "biases": (BIASED, {"bias": "all"}),
    "some biases": (BIASED, {"bias": "lora_only"}),
    "biases of factors": (BIASED, {"lora_bias": True}),
    "saved": (LLAMA, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "tied, saved head": (TIED, {"modules_to_save": ["lm_head"]}),
    "tied, saved embedding": (TIED, {"modules_to_save": ["embed_tokens"]}),
    "tied, both saved": (TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "embedding": (LLAMA, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, dora": (LLAMA, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "tied embedding and head": (TIED, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "head": (LLAMA, {"target_modules": ["lm_head", "q_proj"]}),
    "tied, head": (TIED, {"target_modules": ["lm_head", "q_proj"]}),
    "tied, embedding, head": (TIED, {"target_modules": ["lm_head", "embed_tokens"]}),
    "tokens": (LLAMA, {"trainable_token_indices": [3, 9, 11]}),
    "tied, tokens": (TIED, {"trainable_token_indices": [3, 9, 11]}),
    "tokens of two": (LLAMA, {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [4, 5, 6]}}),
    "more tokens": (LLAMA, {"resized": 44}),
    "tied, more tokens": (TIED, {"resized": 44}),
    "Conv1D, dora": (GPT2, {"target_modules": ["attn.c_proj"], "use_dora": True}),
    "one parameter": (QWEN, {"target_parameters": ["mlp.experts.down_proj"]}),
    "turned experts": (GPT_OSS, {"target_modules": ["q_proj"]} | BOTH),
    "Mixtral's experts": (MIXTRAL, {"target_modules": ["q_proj"]} | BOTH),
    "Mixtral's old names": (MIXTRAL, {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "a router": (MIXTRAL, {"target_modules": ["q_proj", "gate"]}),
}
IDS = torch.arange(2, 34)[None]


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().float()


def log_probs(model):
    with torch.no_grad():
        return model(IDS).logits.log_softmax(-1).numpy()


def randomize(weights):
    with torch.no_grad():
        for weight in weights:
            weight.copy_(torch.randn_like(weight) * 0.2 + (weight.ndim == 1))


def made(folder, base, options):
    """The folders of a base and of an adapter, and what peft makes of both."""
    kind, fields = base
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES | fields)).float()
    randomize(model.parameters())
    model.save_pretrained(folder / "base")
    model, options = loaded(folder / "base"), {**PLAIN, **options}
    if rows := options.pop("resized", None):
        model.resize_token_embeddings(rows, mean_resizing=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    randomize(weight for weight in adapted.parameters() if weight.requires_grad)
    adapted.save_pretrained(folder / "adapter")
    return log_probs(adapted)


@contextlib.contextmanager
def merged(folder):
    config = json.loads((folder / "base" / "config.json").read_text())
    with Adapter(folder / "adapter") as adapter, Checkpoint(folder / "base") as base:
        yield MergedCheckpoint(base, adapter, config)


def edited(folder, **fields):
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("case", [*FEW, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)])
def test_as_peft_has_it(case, tmp_path):
    from safetensors.numpy import save_file

    expected = made(tmp_path, *(FEW | MORE)[case])
    with merged(tmp_path) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
        for name, array in tensors.items():
            info = checkpoint.tensors[name]
            assert (array.shape, array.dtype) == (info.shape, info.dtype)
            some = tuple(slice(1, size - 2) for size in array.shape[:2])
            np.testing.assert_allclose(checkpoint.read(name, some), array[some], atol=1e-6)
        content = checkpoint.content
    head = {"tie_word_embeddings": False} if "lm_head.weight" in tensors else {}
    (out := tmp_path / "out").mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(content | head))
    found, base = log_probs(loaded(out)), log_probs(loaded(tmp_path / "base"))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found[..., : base.shape[-1]] - base).max() > 0.01


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a base and an adapter, and peft's log-probabilities."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, made(folder, LLAMA, {})


@pytest.fixture
def copy(plain, tmp_path):
    """Of the same, to be changed."""
    shutil.copytree(plain[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_on_the_command_line(cli, plain, tmp_path):
    folder, expected = plain
    code, out, err = cli("merge", folder / "base", folder / "adapter", tmp_path / "out", "--json")
    assert (code, json.loads(out)["format"], err) == (0, "hf", "")
    np.testing.assert_allclose(log_probs(loaded(tmp_path / "out")), expected, atol=1e-5)
    code, out, _ = cli("merge", folder / "base", folder / "adapter", tmp_path / "int8", "--quantization", "int8")
    assert (code, "of weights in int8" in out) == (0, True)
    problem = cli("generate", "-m", folder / "adapter", "hello").error()
    assert f"has only an adapter: jaxinfer merge BASE {folder / 'adapter'} DST" in problem
    assert "is there already" in cli("merge", folder / "base", folder / "adapter", tmp_path / "out").error()
    assert "adapter_config.json: no such file" in cli("merge", folder / "base", folder / "base", tmp_path / "x").error()


def test_torch_files_other_prefixes_and_its_tokenizer(copy, plain, cli):
    from safetensors.torch import load_file

    weights = load_file(copy / "adapter" / "adapter_model.safetensors")
    names = {name: name.removeprefix("base_model.model.").replace(".lora_A.", ".lora_A.default.") for name in weights}
    torch.save({names[name]: tensor for name, tensor in weights.items()}, copy / "adapter" / "adapter_model.bin")
    (copy / "adapter" / "adapter_model.safetensors").unlink()
    (copy / "adapter" / "chat_template.jinja").write_text("own")
    (copy / "base" / "chat_template.jinja").write_text("the base's")
    (copy / "base" / "generation_config.json").write_text("{}")
    cli("merge", copy / "base", copy / "adapter", copy / "out")
    np.testing.assert_allclose(log_probs(loaded(copy / "out")), plain[1], atol=1e-5)
    assert (copy / "out" / "chat_template.jinja").read_text() == "own"
    assert (copy / "out" / "generation_config.json").exists()
    assert not (copy / "out" / "adapter_config.json").exists()


def test_in_16_bits_sums_are_rounded_once(copy):
    model = loaded(copy / "base").bfloat16()
    model.save_pretrained(copy / "base")
    with merged(copy) as checkpoint, Adapter(copy / "adapter") as adapter:
        name = "model.layers.0.mlp.down_proj.weight"
        change = adapter.changes[name.removesuffix(".weight")]
        added = change.scale * adapter.read(change.b) @ adapter.read(change.a)
        weight = model.state_dict()[name].float().numpy() + added
        np.testing.assert_array_equal(checkpoint.read(name), weight.astype(checkpoint.tensors[name].dtype))
        assert str(checkpoint.tensors[name].dtype) == "bfloat16"


def test_one_that_changes_nothing_is_said(copy, caplog):
    from safetensors.torch import load_file, save_file

    file = copy / "adapter" / "adapter_model.safetensors"
    save_file({n: t * 0 if "lora_B" in n else t for n, t in load_file(file).items()}, file, {"format": "pt"})
    with merged(copy):
        assert "changes nothing, all its lora_B are zeros" in caplog.text


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA': only LORA is done here"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4': the adapter belongs to a base"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is [1]: this is not done here"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"of_next_year": 3}, "of_next_year is 3: this is not done here"),
        ({"r": 4}, "ranks that are not those of adapter_config.json: model.layers.0.mlp.down_proj has 3 and 3, not 4"),
        ({"r": 0}, "r is 0: it must be an integer from 1"),
        (
            {"target_modules": ["q_proj"]},
            "modules that are no targets by adapter_config.json: model.layers.0.mlp.down_",
        ),
        ({"layers_to_transform": [0]}, "no targets by adapter_config.json: model.layers.1."),
        ({"target_modules": "("}, "target_modules is '(': it must be a regular expression"),
        ({"rank_pattern": {"(a+)+$": 3}}, "must not repeat what repeats"),
        ({"rank_pattern": {r"(?:\w|[a-z]|\.)+(?:!|\?)": 3}}, "takes for ever to match names of modules"),
        ({"target_modules": r"(?:\w|[a-z]|\.)+(?:!|\?)"}, "takes for ever to match names of modules"),
        ({"r": None}, "r is missing: it must be a number"),
        ({"use_dora": "false"}, "use_dora is 'false'"),
        ({"rank_pattern": [1]}, "rank_pattern is [1]: it must be an object of numbers by names"),
        ({"layers_to_transform": [-1]}, "layers_to_transform is [-1]: it must be integers of at least 0"),
    ],
)
def test_what_can_not_be(copy, fields, problem):
    edited(copy, **fields)
    with pytest.raises(ValueError, match="adapter") as error, merged(copy):
        pass
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("odd", ["lora_A.weight", "lora_B.bias", "magnitude", "delta", "norm.weight"])
def test_shapes(odd, tmp_path):
    from safetensors.torch import load_file, save_file

    options = {"norm.weight": {"modules_to_save": ["model.norm"]}, "delta": {"trainable_token_indices": [3, 9]}}
    options |= {"lora_B.bias": {"lora_bias": True}, "magnitude": {"use_dora": True}}
    made(tmp_path, BIASED, options.get(odd, {}))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if odd in name)
    weights[name] = torch.ones(*weights[name].shape[:-1], 7)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"is not an adapter of .*: other shapes: .*7"), merged(tmp_path):
        pass


def test_of_another_base(copy):
    from safetensors.torch import load_file, save_file

    config = json.loads((copy / "base" / "config.json").read_text())
    other = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES | {"hidden_size": 24}))
    other.save_pretrained(copy / "base")
    problem = r"not an adapter of .*: other shapes: .*q_proj.weight \[24, 24\] by \[16, 3\] and \[3, 16\]"
    with pytest.raises(ValueError, match=problem), merged(copy):
        pass
    (copy / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with (
        pytest.raises(ValueError, match=r"is quantized \(fp8\): merge into the model that it was made from"),
        merged(copy),
    ):
        pass
    file = copy / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="modules with one factor only, the file is not complete"), merged(copy):
        pass
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"), merged(copy):
        pass
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no weights; expected adapter_model"), merged(copy):
        pass
