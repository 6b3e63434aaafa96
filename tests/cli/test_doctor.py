"""`jaxinfer doctor`."""

import json

import jax

from jaxinfer import doctor
from jaxinfer.attention import BACKENDS
from jaxinfer.demo import ENCODER_DIR
from jaxinfer.kernels.cpu import kernels


def test_doctor(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        code, out, err = cli("doctor", "--json")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert f"jax {jax.__version__}" in report["versions"]
    assert report["devices"] == [f"cpu:{i} cpu" for i in range(8)]
    assert report["attention"] == ("a CPU kernel" if kernels().level else "plain XLA")
    used = [line for line in report["attention backends"] if line.endswith(": used")]
    assert used == [f"{report['attention'].partition(':')[0]}: used"]
    assert "JAX's ragged paged attention kernel: it is for TPUs, and this is cpu" in report["attention backends"]
    assert len(report["attention backends"]) == len(BACKENDS)
    assert report["CPU kernels"].startswith(kernels().level or "none, XLA computes everything: ")
    assert kernels().why in report["CPU kernels"]
    assert report["compilation cache"] == f"{tmp_path}: 0 files, 0 MiB"
    monkeypatch.setenv("JAXINFER_CACHE_DIR", "off")
    table = cli("doctor")
    assert all(name in table.out for name in report)


def test_without_a_device_all_else_is_said(cli, monkeypatch, model):
    """JAX_PLATFORMS=cuda where there is no GPU: JAX raises an AssertionError without a word, or a RuntimeError."""

    def fail():
        raise AssertionError

    monkeypatch.setenv("JAXINFER_CACHE_DIR", "off")
    monkeypatch.setattr(jax, "local_devices", fail)
    code, out, err = cli("doctor", "--json", "--model", model)
    report = json.loads(out)
    assert code == 2
    assert report["devices"].startswith("JAX_PLATFORMS is 'cpu': there is no such device here")
    assert err == f"jaxinfer: error: {report['devices']}\n"
    assert f"jax {jax.__version__}" in report["versions"]
    assert report["CPU kernels"].endswith("; not used" if kernels().level else kernels().why)


def test_a_model(cli, monkeypatch, model, tmp_path):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", "off")
    report = json.loads(cli("doctor", "--json", "-m", model, "--max-model-len", 64).out)
    assert report["the model's precision"] == "float32"
    why = (
        "the kernel is for head sizes that are multiples of 16, and the model has 8"
        if kernels().level
        else kernels().why
    )
    assert report["the model's attention"] == f"plain XLA: {why}"
    assert report["the model's context"].startswith("64 tokens, ")
    wider = json.loads((model / "config.json").read_text()) | {"head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(wider))
    report = json.loads(cli("doctor", "--json", "-m", tmp_path).out)
    assert report["the model's attention"] == ("a CPU kernel" if kernels().level else f"plain XLA: {kernels().why}")
    assert "no/such" in cli("doctor", "-m", "no/such").error()


def test_models_that_embed_or_classify(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", "off")
    report = json.loads(cli("doctor", "--json", "-m", ENCODER_DIR, "--dtype", "float32", "--max-model-len", 64).out)
    assert report["the model's precision"] == "float32"
    assert report["the model's attention"] == ("a CPU kernel" if kernels().level else "plain XLA")
    assert report["the model's context"] == "texts of 64 tokens, 1024 on each device at a time"
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    what = {"architectures": ["DebertaV2ForSequenceClassification"], "model_type": "deberta-v2"}
    near = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 4}
    (tmp_path / "config.json").write_text(
        json.dumps(what | sizes | near | {"vocab_size": 9, "max_position_embeddings": 32})
    )
    report = json.loads(cli("doctor", "--json", "-m", tmp_path).out)
    assert report["the model's attention"] == "plain XLA"  # which the kernel does not have


def test_huge_pages(monkeypatch, tmp_path):
    file = tmp_path / "enabled"
    monkeypatch.setattr(doctor, "HUGE_PAGES", file)
    assert doctor._huge_pages() == "none that this system lets programs ask for"
    file.write_text("always [madvise] never\n")
    assert doctor._huge_pages() == "on (madvise)"
    file.write_text("always madvise [never]\n")
    assert doctor._huge_pages() == f"off, and decoding on CPU is slower without: as root, echo madvise > {file}"
