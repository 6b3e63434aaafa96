"""`jaxinfer doctor`."""

import json

import jax

from jaxinfer import doctor
from jaxinfer.kernels.cpu import kernels


def test_doctor(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        code, out, err = cli("doctor", "--json")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert f"jax {jax.__version__}" in found["versions"]
    assert found["devices"] == [f"cpu:{i} cpu" for i in range(8)]
    assert found["attention"] == ("a CPU kernel" if kernels().level else "plain XLA")
    assert found["CPU kernels"].startswith(kernels().level or "none, XLA computes everything: ")
    assert kernels().why in found["CPU kernels"]
    assert found["compilation cache"] == f"{tmp_path}: 0 files, 0 MiB"
    monkeypatch.setenv("JAXINFER_CACHE_DIR", "off")
    table = cli("doctor")
    assert all(name in table.out for name in found)


def test_huge_pages(monkeypatch, tmp_path):
    file = tmp_path / "enabled"
    monkeypatch.setattr(doctor, "HUGE_PAGES", file)
    assert doctor._huge_pages() == "none that this system lets programs ask for"
    file.write_text("always [madvise] never\n")
    assert doctor._huge_pages() == "on (madvise)"
    file.write_text("always madvise [never]\n")
    assert doctor._huge_pages() == f"off, and decoding on CPU is slower without: as root, echo madvise > {file}"
