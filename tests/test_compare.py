"""What `jaxinfer compare` says, against another way to the same numbers."""

import contextlib
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxinfer import LLM
from jaxinfer.compare import compare
from jaxinfer.convert import convert
from jaxinfer.demo import MODEL_DIR
from jaxinfer.demo.questions import held_out_questions
from jaxinfer.quantization.quantize import dequantize, quantize
from jaxinfer.quantization.schemes import SCHEMES
from tests.adapters import write_adapter
from tests.plain import CONFIG, random_tensors, write_checkpoint

OPTIONS = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "max_model_len": 96, "page_size": 8}
TEXTS = ["The river runs under the bridge.", "", "A lamp, a stone and seven green papers.", "x"]


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("llama").folder


@pytest.fixture(scope="module")
def prices(folder):
    return list(compare(folder, ["int8", "fp8"], TEXTS, **OPTIONS))


@pytest.mark.slow
def test_the_figures(folder, prices):
    base, int8, fp8 = prices
    assert (base.scheme, int8.scheme, fp8.scheme) == (None, "int8", "fp8")
    assert (base.kl_mean, base.kl_p99, base.top1) == (0, 0, 1)
    assert 0 < int8.kl_mean < fp8.kl_mean < 0.1
    assert int8.kl_mean <= int8.kl_p99
    assert 0.5 < fp8.top1 <= 1
    assert base.cache_bytes_per_token == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, their size, float32
    assert int8.weight_bytes < 0.6 * base.weight_bytes
    assert base.decode_rate > 0
    for scheme, price in ((None, base), ("int8", int8)):
        with LLM(folder, quantization=scheme, **OPTIONS) as llm:
            texts = [text for text in TEXTS if len(llm.tokenizer.encode(text)) > 1]
            scored = llm.score(texts)
        tokens = sum(len(score.logprobs) for score in scored)
        assert tokens == price.tokens
        perplexity = math.exp(-sum(score.logprob for score in scored) / tokens)
        assert price.perplexity == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.slow
def test_a_folder(folder, prices, tmp_path):
    """The model in another form, as convert and quantize write it: it costs what the scheme costs."""
    convert(folder, tmp_path / "int8", quantization="int8", show_progress=False)
    _, price = compare(folder, [str(tmp_path / "int8")], TEXTS, **OPTIONS)
    assert price.scheme == str(tmp_path / "int8")
    assert price.weight_bytes == prices[1].weight_bytes
    assert price.kl_mean == pytest.approx(prices[1].kl_mean, rel=1e-4)
    with pytest.raises(ValueError, match="it is another model"):
        list(compare(folder, [str(MODEL_DIR)], TEXTS, **OPTIONS))


@pytest.mark.slow
def test_a_divergence(folder):
    """By hand, from the model's own forward pass."""
    from jaxinfer.compare import _distributions

    distributions = []
    for scheme in (None, "fp8"):
        with LLM(folder, quantization=scheme, **OPTIONS) as llm:
            ids = llm.tokenizer.encode(TEXTS[0])
            distributions.append(np.concatenate(list(_distributions(llm, [ids, ids[:3]]))).astype(np.float64))
    p, q = distributions
    np.testing.assert_allclose(np.exp(p).sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(p[-2:], p[:2], atol=1e-5)
    expected = np.sum(np.exp(p[:-2]) * (p[:-2] - q[:-2]), axis=1)
    price = list(compare(folder, ["fp8"], TEXTS[:1], **OPTIONS))[1]
    assert price.kl_mean == pytest.approx(expected.mean(), rel=1e-3)
    assert price.kl_p99 == pytest.approx(np.quantile(expected, 0.99), rel=1e-3)


@pytest.mark.slow
def test_what_16_bits_and_a_quantized_cache_cost():
    """On what the packaged model knows: sums in float32, and norms, rotations and softmax, keep it near float32."""
    texts = [f"{question.text} {question.answer}" for question in held_out_questions(24, 2)]
    options = {"dtype": "float32", "max_num_seqs": 1, "max_num_batched_tokens": 32, "max_model_len": 128}
    base, *others = compare(MODEL_DIR, ["float16", "bfloat16", "kv-bfloat16", "kv-int8", "kv-fp8"], texts, **options)
    half, brain, brief, int8, fp8 = (price.kl_mean for price in others)
    assert 0 < half < 2e-6
    assert 0 < brief < 2e-6
    assert half < int8 < 5e-5
    assert int8 < fp8 < 1e-3
    assert half < brain < 1e-3
    assert all(price.top1 > 0.97 for price in others)
    assert [price.weight_bytes / base.weight_bytes for price in others] == pytest.approx([0.5, 0.5, 1, 1, 1], abs=1e-3)
    cache = [base.cache_bytes_per_token, *(price.cache_bytes_per_token for price in others)]
    assert cache == [2560, 1280, 1280, 1280, 720, 720]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The folders of a base whose weights fit groups of 64, and of an adapter."""
    config = CONFIG | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    there = tmp_path_factory.mktemp("adapted")
    folder = write_checkpoint(there / "base", config, random_tensors(config))
    return folder, write_adapter(there / "adapter", folder, scale=0.2)


@pytest.mark.slow
@pytest.mark.long
def test_an_adapter_beside_the_weights_and_merged(adapted, tmp_path):
    """Beside nf4 it does what it does merged onto what nf4 stands for; merged and then in nf4 it does not."""
    folder, adapter = adapted
    options = {"adapter": adapter, "onto": "dequantized", "base_quantization": "nf4", "format": "hf"}
    onto = convert(folder, tmp_path / "onto", show_progress=False, **options).output
    prices = list(compare(folder, ["nf4", onto, f"{folder}/"], TEXTS, adapter=adapter, **OPTIONS))
    base, merged, beside, rounded, written, without = (price.kl_mean for price in prices)
    assert (base, prices[1].top1) == (0, 1)
    assert abs(merged) < 1e-6
    assert beside == pytest.approx(written, rel=0.01)
    assert beside > 1e-4
    assert abs(rounded / beside - 1) > 0.05
    assert without > 10 * beside
    assert prices[0].weight_bytes > prices[1].weight_bytes


def test_what_is_compared_with_an_adapter(adapted, cli, monkeypatch, tmp_path):
    """As it is, then by each scheme, beside the weights and merged; of a quantized base, onto what is left of it."""
    from jaxinfer import compare as module

    (folder, adapter), loaded = adapted, []

    class Loaded(contextlib.nullcontext):
        model = SimpleNamespace(config=SimpleNamespace(vocab_size=3))

        def __init__(self, model, **options):
            super().__init__(self)
            kept = load_file(f"{model}/model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
            loaded.append((options.get("quantization"), "adapters" in options, kept))
            if options.get("quantization") == "int8":
                raise ValueError("it has no room")

    def price(llm, scheme, sequences, base, right, adapter):
        return module.Price(scheme, 7, 0.0, 0.0, 1.0, 2.0, 100, 8, 5.0, None, adapter)

    monkeypatch.setattr(module, "LLM", Loaded)
    monkeypatch.setattr(module, "_sequences", lambda *_: [[1, 2]])
    monkeypatch.setattr(module, "_price", price)
    data = tmp_path / "texts.txt"
    data.write_text(TEXTS[0])
    asked = ("compare", folder, "--data", data, "--adapter", adapter, "--schemes")
    code, out, err = cli(*asked, f"nf4,int8,{folder}", "--json")
    report = json.loads(out)
    rows = [(None, "beside"), (None, "merged"), ("nf4", "beside"), ("nf4", "merged"), (str(folder), "merged")]
    assert [(price["scheme"], price["adapter"]) for price in report["prices"]] == rows
    assert report["errors"] == dict.fromkeys(("int8 + adapter", "int8, merged"), "it has no room")
    assert (code, "error: int8, merged: it has no room" in err) == (1, True)
    plain = loaded[0][2]
    same = [(scheme, beside, np.array_equal(kept, plain)) for scheme, beside, kept in loaded]
    tried = [("nf4", True, True), ("nf4", False, False), ("int8", True, True), ("int8", False, False)]
    assert same == [(None, True, True), (None, False, False), *tried, (None, False, True)]
    added = loaded[1][2] - plain
    loaded.clear()
    table = cli(*asked, "nf4", "--base-quantization", "nf4").out.split("\n")
    assert {"as it", "nf4 +", "nf4,"} <= {line[2:7].strip() for line in table}
    assert [one[:2] for one in loaded] == [("nf4", True), (None, False), ("nf4", True), ("nf4", False)]
    scheme = SCHEMES["nf4"]
    np.testing.assert_allclose(loaded[1][2], dequantize(*quantize(plain, scheme), scheme) + added, atol=1e-5)
    problem = cli("compare", folder, "--data", data, "--schemes", "nf4", "--base-quantization", "nf4").error()
    assert "base_quantization is 'nf4', and there is no adapter" in problem


@pytest.mark.slow
def test_the_command(cli, folder, tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:1]))
    asked = ("compare", folder, "--data", data, "--schemes", "int8", "--max-model-len", 64)
    report = json.loads(cli(*asked, "--json", "--plot", tmp_path / "prices.png").out)
    assert [price["scheme"] for price in report["prices"]] == [None, "int8"]
    assert report["prices"][1]["exact_match"] is None
    assert (tmp_path / "prices.png").read_bytes()[:4] == b"\x89PNG"


def test_a_scheme_that_is_not_to_be_had_leaves_the_others(cli, folder, tmp_path, monkeypatch):
    """The figures of those that are come out, the other one's error is said, and the exit code is 1."""
    from jaxinfer import compare as module

    price = module.Price(None, 7, 0.0, 0.0, 1.0, 2.0, 100, 8, 5.0, None)
    monkeypatch.setattr(module, "_price", lambda llm, scheme, *_: dataclasses.replace(price, scheme=scheme))
    load = module.LLM

    def refuse(model, **options):
        if options.get("quantization") == {"*": "int4"}:
            raise ValueError("it has no room")
        return load(model, **options)

    monkeypatch.setattr(module, "LLM", refuse)
    data = tmp_path / "texts.txt"
    data.write_text(TEXTS[0])
    asked = ("compare", folder, "--data", data, "--max-model-len", 64)
    code, out, err = cli(*asked, "--schemes", "*=int4; int8;*.mlp.*=int8,*=none", "--json")
    report = json.loads(out)
    assert (code, err) == (1, "jaxinfer: error: *=int4: it has no room\n")
    assert [price["scheme"] for price in report["prices"]] == [None, "int8", "*.mlp.*=int8,*=none"]
    assert report["errors"] == {"*=int4": "it has no room"}

    def interrupted(llm, scheme, *_):
        if scheme is not None:
            raise KeyboardInterrupt
        return price

    monkeypatch.setattr(module, "_price", interrupted)
    code, out, _ = cli(*asked, "--schemes", "int8", "--json")
    assert code == 130
    assert [price["scheme"] for price in json.loads(out)["prices"]] == [None]
    with pytest.raises(ValueError, match="it has no room"):
        list(compare(folder, ["*=int4"], TEXTS, **OPTIONS))


def test_bad_input(cli, folder, tmp_path):
    data = tmp_path / "texts.txt"
    data.write_text("x\n")
    assert "nothing to compare on: give texts with --data" in cli("compare", folder).error()
    assert "at least one must have two tokens" in cli("compare", folder, "--data", data).error()
    assert (
        "--schemes has 'int3': there are int8, " in cli("compare", folder, "--data", data, "--schemes", "int3").error()
    )
    assert "here it is --schemes" in cli("compare", folder, "--data", data, "--quantization", "int8").error()
    deployment = tmp_path / "deployment.yaml"
    deployment.write_text(f"model: {folder}\ncompiled: {tmp_path}\n")
    assert "here it is --schemes" in cli("compare", "--config", deployment, "--data", data).error()
    data.with_suffix(".jsonl").write_text('{"texts": 1}\n')
    assert "texts.jsonl:1" in cli("compare", folder, "--data", data.with_suffix(".jsonl")).error()
