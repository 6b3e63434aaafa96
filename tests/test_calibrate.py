"""`jaxinfer quantize`: calibrated weights are nearer to the model than rounded ones, on texts that were not used."""

import itertools
import json

import jax
import numpy as np
import pytest

from jaxinfer.attention import ForwardBatch
from jaxinfer.calibrate import Layers, calibrate, fold
from jaxinfer.checkpoint.open import load_weights, open_weights
from jaxinfer.demo import MODEL_DIR
from jaxinfer.demo.questions import held_out_questions, training_questions
from jaxinfer.models.model import AbstractModel
from jaxinfer.text.tokenizer import load_tokenizer


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


@pytest.mark.parametrize(
    ("scheme", "method", "share"),
    [
        ("int4", "gptq", 0.6),
        pytest.param("int4", "awq", 0.9, marks=pytest.mark.slow),
        pytest.param("int8-w8a8", "smoothquant", 1.0, marks=pytest.mark.slow),
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
    reference = checkpoints(name)
    model = AbstractModel.from_config(json.loads((reference.folder / "config.json").read_text()), "float32")
    with open_weights(reference.folder) as weights:
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
    batch = ForwardBatch.of_sequences([reference.prompts[-1]])
    ours = np.asarray(jax.jit(lambda params: model.bind(params)(batch, None)[0])(changed))
    np.testing.assert_allclose(ours, reference.logits, atol=2e-4)


def test_layer_by_layer_is_the_model(checkpoints):
    """Sequences that share batches, too; and what goes into q, k and v is one thing."""
    reference = checkpoints("mistral-window")
    model = AbstractModel.from_config(json.loads((reference.folder / "config.json").read_text()), "float32")
    with open_weights(reference.folder) as weights:
        params = load_weights(model, weights, jax.devices()[0])
    layers = Layers(model, jax.devices()[0], [*reference.prompts, list(range(300))[:200] * 2])
    assert len(layers.batches) == 1
    stream = layers.embed(params)
    for i in range(2):
        inputs, stream = layers.run(i, {name: params[name] for name in layers.names[i]}, stream, "sample")
    assert inputs["self_attn.q_proj"] is inputs["self_attn.v_proj"]
    assert inputs["mlp.down_proj"].shape == (508, 48)
    first = sum(map(len, reference.prompts[:-1]))
    end = np.asarray(model.bind(params).logits(stream[0]))[first:][: len(reference.prompts[-1])]
    np.testing.assert_allclose(end, reference.logits, atol=1e-4)


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
