"""`jaxinfer quantize`: calibrated weights are nearer to the model than rounded ones, on texts that were not used."""

import itertools
import json

import jax
import numpy as np
import pytest

from jaxinfer.attention import ForwardBatch
from jaxinfer.calibrate import calibrate, fold
from jaxinfer.checkpoint.open import load_weights, open_weights
from jaxinfer.demo import MODEL_DIR
from jaxinfer.demo.questions import held_out_questions, training_questions
from jaxinfer.layerwise import FEW, Layers
from jaxinfer.models.model import AbstractModel, scales
from jaxinfer.quantization.calibrate import round_to_nearest, times
from jaxinfer.quantization.schemes import SCHEMES
from jaxinfer.text.tokenizer import load_tokenizer
from tests.models.test_families import reference


def logits(folder, sequences, quantization=None):
    """Of a checkpoint in float32, and of quantized weights what they stand for."""
    config = json.loads((folder / "config.json").read_text())
    with open_weights(folder) as weights:
        model = AbstractModel.from_config(config, "float32", quantization)
        params = load_weights(model, weights, jax.devices()[0])
    total = sum(map(len, sequences))
    run = jax.jit(lambda params, batch: model.bind(params)(batch, None)[0])
    return np.asarray(run(params, ForwardBatch.of_sequences(sequences, -(-total // 64) * 64)))[:total]


def divergence(base, other):
    base, other = (np.asarray(jax.nn.log_softmax(values)) for values in (base, other))
    return float(np.mean(np.sum(np.exp(base) * (base - other), axis=1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "method", "share"),
    [
        ("int4", "gptq", 0.6),
        ("int4", "awq", 0.9),
        ("int8-w8a8", "smoothquant", 1.0),
    ],
)
def test_nearer_than_rounding(tmp_path, scheme, method, share):
    texts = [f"{question.text} {question.answer}" for question in itertools.islice(training_questions(3), 200)]
    options = {"scheme": scheme, "method": method, "format": "orbax", "show_progress": False}
    done = calibrate(MODEL_DIR, tmp_path / "new", texts, max_tokens=4000, **options)
    assert 3900 < done.tokens <= 4000
    tokenizer = load_tokenizer(MODEL_DIR)
    held_out = [tokenizer.encode(f"{question.text} {question.answer}") for question in held_out_questions(60, 1)]
    base = logits(MODEL_DIR, held_out)
    rounded = divergence(base, logits(MODEL_DIR, held_out, scheme))
    assert divergence(base, logits(tmp_path / "new", held_out)) < share * rounded


@pytest.mark.parametrize("name", ["llama-bias-head_dim-gelu", "gpt2", "qwen3-layer_types-bias"])
def test_folding_changes_nothing(checkpoints, name):
    """All factors at once, where query heads share values too."""
    found = checkpoints(name)
    model = AbstractModel.from_config(json.loads((found.folder / "config.json").read_text()), "float32")
    with open_weights(found.folder) as weights:
        params = load_weights(model, weights, jax.devices()[0])
    changed = {key: np.array(value) for key, value in params.items()}
    rng, config = np.random.default_rng(0), model.config
    layers = Layers(model, jax.devices()[0], [[1, 2, 3]])
    for prefix, feeds in zip(layers.prefixes, layers.feeds, strict=True):
        for source, taking in feeds:
            channels = params[f"{prefix}.{taking[0]}.weight"].shape[1]
            shared = None
            factors = rng.uniform(0.3, 3, channels).astype(np.float32)
            if channels != params[f"{prefix}.{source}.weight"].shape[0]:
                shared = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim
                factors = np.broadcast_to(factors.reshape(shared)[:, :1], shared).reshape(-1)
            fold(changed, f"{prefix}.{source}", [f"{prefix}.{path}" for path in taking], factors, shared)
    assert sum(not np.array_equal(changed[key], params[key]) for key in params) >= 2 * 8
    batch = ForwardBatch.of_sequences([found.prompts[-1]])
    ours = np.asarray(jax.jit(lambda params: model.bind(params)(batch, None)[0])(changed))
    np.testing.assert_allclose(ours, found.logits, atol=2e-4)


def test_layer_by_layer_is_the_model(checkpoints):
    """Sequences that share batches, too; and what goes into q, k and v is one thing."""
    found = checkpoints("mistral-window")
    model = AbstractModel.from_config(json.loads((found.folder / "config.json").read_text()), "float32")
    with open_weights(found.folder) as weights:
        params = load_weights(model, weights, jax.devices()[0])
    layers = Layers(model, jax.devices()[0], [*found.prompts, list(range(300))[:200] * 2])
    assert len(layers.batches) == 1
    stream = layers.embed(params)
    for i in range(2):
        given, stream = layers.run(i, {name: params[name] for name in layers.names[i]}, stream, "sample")
    assert given["self_attn.q_proj"] is given["self_attn.v_proj"]
    assert given["mlp.down_proj"].sample.shape == (508, 48)
    first = sum(map(len, found.prompts[:-1]))
    end = np.asarray(model.bind(params).logits(stream[0]))[first:][: len(found.prompts[-1])]
    np.testing.assert_allclose(end, found.logits, atol=1e-4)


@pytest.mark.parametrize("method", ["gptq", pytest.param("awq", marks=pytest.mark.slow)])
def test_experts_by_the_tokens_that_go_to_them(checkpoints, tmp_path, caplog, method):
    """What each makes of its own tokens is nearer than by rounding; those with few tokens are rounded."""
    folder = reference(checkpoints.root, "qwen3_moe", "large").folder
    text = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 90)))
    options = {"scheme": "int8", "method": method, "format": "orbax", "show_progress": False}
    caplog.set_level("WARNING", "jaxinfer")
    done = calibrate(folder, tmp_path / "new", [text], **options)
    config = json.loads((folder / "config.json").read_text())
    model, quantized = (AbstractModel.from_config(config, "float32", scheme) for scheme in (None, "int8"))
    device = jax.devices()[0]
    with open_weights(folder) as weights, open_weights(tmp_path / "new") as made:
        params, stood_for = load_weights(model, weights, device), load_weights(quantized, made, device)
    layers = Layers(model, device, [load_tokenizer(folder).encode(text)])
    given, _ = layers.run(0, {name: params[name] for name in layers.names[0]}, layers.embed(params), "hessian")
    assert given["mlp.experts.gate_proj"] is given["mlp.experts.up_proj"]
    few = nearer = 0
    for path in ("mlp.experts.up_proj", "mlp.experts.down_proj"):
        name, seen = f"{layers.prefixes[0]}.{path}.weight", given[path]
        assert seen.tokens.sum() == done.tokens * config["num_experts_per_tok"]
        exact = np.asarray(params[name])
        values = np.asarray(stood_for[name], np.float32), np.asarray(stood_for[scales(name)])
        rounded = round_to_nearest(exact, np.ones(exact.shape[-1], np.float32), SCHEMES["int8"])
        for e, tokens in enumerate(seen.tokens):
            ours, nearest = (times(v[e], s[e]) - exact[e] for v, s in (values, rounded))
            if tokens < FEW:
                np.testing.assert_array_equal(ours, nearest)
                few += 1
            else:
                moments = seen.moments[e] if method == "gptq" else np.diag(np.diag(seen.moments[e]))
                own, other = (float(np.sum((off @ moments) * off)) for off in (ours, nearest))
                assert own <= other
                nearer += own < other
    assert few > 2
    assert nearer > 2
    assert f"fewer than {FEW} tokens" in caplog.text


@pytest.mark.parametrize("kept", ["hessian", "sample"])
def test_what_experts_are_given(checkpoints, kept):
    """All tokens go to each of three, and what they are given adds up over batches."""
    folder, tokens, *_ = reference(checkpoints.root, "qwen3_moe-all", "large")
    model = AbstractModel.from_config(json.loads((folder / "config.json").read_text()), "float32")
    with open_weights(folder) as weights:
        params = load_weights(model, weights, jax.devices()[0])
    sequences = [tokens * 3, tokens[:40] * 6]

    def given(sequences):
        layers = Layers(model, jax.devices()[0], sequences)
        names = layers.names[0]
        return layers.run(0, {name: params[name] for name in names}, layers.embed(params), kept)[0]

    together, *apart = (given(some)["mlp.experts.gate_proj"] for some in (sequences, sequences[:1], sequences[1:]))
    assert together.tokens.tolist() == [210 + 240] * 3
    for moments in together.moments:
        np.testing.assert_allclose(moments, sum(seen.moments[0] for seen in apart), rtol=1e-3, atol=1e-2)
    assert together.moments.shape == (3, 32, 32)[: 3 if kept == "hessian" else 2]


@pytest.mark.slow
def test_the_same_again(checkpoints, tmp_path):
    folder = checkpoints("gpt2").folder
    texts = ["abcdefgh" * 20, [{"role": "user", "content": "what is it?"}]]
    options = {"scheme": "int8", "method": "awq", "format": "orbax", "show_progress": False}
    outputs = []
    for name in ("one", "two"):
        assert calibrate(folder, tmp_path / name, texts, **options).texts == 2
        outputs.append(logits(tmp_path / name, [[1, 2, 3, 4]]))
    assert np.array_equal(*outputs)


def test_mistakes(cli, tmp_path, checkpoints):
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "some text to look at"}\n')
    asked = ("quantize", MODEL_DIR, tmp_path / "new", "--data", data)
    for scheme, method, problem in (
        ("int3", "gptq", "scheme is 'int3': it must be one of int8"),
        ("int4", "smoothquant", "method is 'smoothquant', and scheme 'int4': awq and gptq are for that"),
        ("int8-w8a8", "awq", "smoothquant and gptq are for that"),
        ("fp8-block", "gptq", "its scales are of several rows"),
    ):
        assert problem in cli(*asked, "--scheme", scheme, "--method", method).error()
    asked += ("--scheme", "int4", "--method", "gptq")
    for content, problem in (
        ("", "has no rows, and so no text to calibrate with"),
        ('{"question": "a"}\n{"text": 5}\n', f"{data}:1: has none of prompt, messages, text"),
        ('{"text": ""}\n', "text is empty"),
        ('{"prompt_token_ids": [1, 2]}\n', "token ids are no text"),
    ):
        data.write_text(content)
        assert problem in cli(*asked).error()
    data.write_text('{"text": "some text to look at"}\n')
    gpt2 = checkpoints("gpt2").folder
    message = cli(
        "quantize", gpt2, tmp_path / "new", "--data", data, "--scheme", "int8", "--method", "awq", "--format", "hf"
    ).error()
    assert "compressed-tensors has no form for: use format orbax" in message
    assert [file.name for file in tmp_path.iterdir()] == ["texts.jsonl"]
