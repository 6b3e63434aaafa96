"""Plans of models that make vectors or classes: from shapes, counted by hand."""

import json
from pathlib import Path

import pytest

from jaxinfer.demo import CLASSIFIER_DIR
from jaxinfer.engine.config import check_options
from jaxinfer.engine.loading import Opened
from jaxinfer.plan.pooled import fit_pooled
from jaxinfer.plan.targets import GPUS, find_target

BERT = {"model_type": "bert"}  # base


def bound(config, length, topology="h100-1", **options):
    opened = Opened(Path("model"), config, "embed", None, None, check_options(options), options, 0.0)
    return fit_pooled(opened, find_target(topology)).bound(length)


def test_a_bound():
    """Products of twelve layers, scores and their products with values; tables are looked up."""
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    figures = bound(BERT, 128, dtype="bfloat16", max_num_batched_tokens=1024)
    assert figures["texts"] == 8
    assert figures["flops"] == pytest.approx(2 * 1024 * (matrices + 12 * 2 * 128 * 768))
    assert figures["bytes_moved"] == matrices * 2
    assert figures["bytes_sent"] == 0
    seconds = max(figures["flops"] / GPUS["h100"].flops, matrices * 2 / GPUS["h100"].bandwidth)
    assert figures["seconds"] == pytest.approx(seconds)
    assert figures["texts_per_second"] == pytest.approx(8 / seconds)
    assert bound(BERT, 128, quantization="int8")["bytes_moved"] == pytest.approx(matrices, rel=0.01)
    halves, quarters = (bound(BERT, 64, "h100-2", mesh=mesh) for mesh in ("data=2", "tensor=2"))
    assert halves["texts"] == quarters["texts"] == 128
    assert halves["bytes_sent"] == 0 < quarters["bytes_sent"]
    assert halves["texts_per_second_per_chip"] == pytest.approx(halves["texts_per_second"] / 2)


def test_what_tokens_see():
    """A window of 64 to each side in two layers of three; a decoder's sees what came before; ALBERT's one layer runs
    twelve times, and is read once."""
    width = {
        "vocab_size": 1000,
        "hidden_size": 768,
        "num_hidden_layers": 3,
        "num_attention_heads": 12,
        "intermediate_size": 1152,
    }
    modern = {"model_type": "modernbert", **width}
    wide = bound(modern | {"local_attention": 2 * 4096}, 4096, dtype="bfloat16")
    assert wide["flops"] - bound(modern, 4096, dtype="bfloat16")["flops"] == pytest.approx(
        2 * 2 * 2 * 8192 * 768 * (4096 - (129 - 64 * 65 / 4096)), rel=1e-6
    )
    causal = {
        "model_type": "qwen3",
        **width,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "max_position_embeddings": 8192,
    }
    both = causal | {"model_type": "eurobert", "hidden_act": "silu"}
    seen = [bound(config, 1000, max_num_batched_tokens=1000)["flops"] for config in (causal, both)]
    assert seen[1] - seen[0] == pytest.approx(2 * 3 * 2 * 1000 * 768 * (1000 - 1001 / 2), rel=1e-6)
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
    albert = bound({"model_type": "albert", "vocab_size": 1000, **sizes}, 128)
    assert albert["flops"] == pytest.approx(bound(BERT, 128)["flops"], rel=0.01)
    assert albert["bytes_moved"] == pytest.approx(bound(BERT, 128)["bytes_moved"] / 12, rel=0.05)


def test_the_command(cli, tmp_path):
    figures = json.loads(cli("plan", CLASSIFIER_DIR, "--topology", "h100-2", "--json").out)
    assert (figures["task"], figures["max_model_len"], figures["mesh"]) == ("classify", 512, "tensor=2")
    assert [step["tokens"] for step in figures["texts"]] == [16, 64, 256, 512]
    assert figures["bytes"]["free"] == figures["bytes"]["memory"] - figures["bytes"]["weights"]
    assert "texts/s" in cli("plan", CLASSIFIER_DIR, "--topology", "h100-2").out
    (tmp_path / "config.json").write_text(json.dumps(BERT | {"architectures": ["BertModel"]}))
    ranked = json.loads(cli("plan", tmp_path, "--sweep", "--context", 100, "--topology", "v6e-8", "--json").out)
    assert {entry["tokens"] for entry in ranked} == {100}
    rates = [entry["texts_per_second_per_chip"] for entry in ranked]
    assert rates == sorted(rates, reverse=True)
    asked = "plan", tmp_path, "--topology", "h100"
    assert "a text of this model has at most 512 tokens" in cli(*asked, "--context", 513).error()
    assert "the model makes no text: leave it out" in cli(*asked, "--plot", tmp_path / "x.png").error()
    assert "topology is missing" in cli("plan", tmp_path).error()
