"""One file, many files, and all the ways in which they disagree."""

import gc
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer.checkpoint.folder import INDEX, SINGLE, Checkpoint

A, B, C = (np.arange(6, dtype=np.float32).reshape(3, 2) + i for i in range(3))
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def index(folder: Path, **weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": A, "b": B}, tmp_path / ONE)
    save_file({"c": C}, tmp_path / TWO)
    index(tmp_path, a=ONE, b=ONE, c=TWO)
    return tmp_path


def check(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b", "c"]
        assert checkpoint.nbytes == A.nbytes * 3
        assert checkpoint.bytes_read == 0
        for name, array in {"a": A, "b": B, "c": C}.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)
        assert checkpoint.bytes_read == checkpoint.nbytes
        np.testing.assert_array_equal(checkpoint.read("b", (slice(1, 3), slice(0, 1))), B[1:3, 0:1])
        assert checkpoint.bytes_read == checkpoint.nbytes + 2 * 4
        with pytest.raises(ValueError, match="has no tensor 'x'"):
            checkpoint.read("x")


def test_one_file(tmp_path: Path) -> None:
    save_file({"a": A, "b": B, "c": C}, tmp_path / SINGLE)
    check(tmp_path)


def test_many_files(sharded: Path) -> None:
    check(sharded)


def test_many_files_without_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    check(sharded)


def test_one_file_of_another_name(tmp_path: Path) -> None:
    save_file({"a": A, "b": B, "c": C}, tmp_path / "weights.safetensors")
    check(tmp_path)


def test_the_single_file_comes_before_the_index(sharded: Path) -> None:
    save_file({"x": A}, sharded / SINGLE)
    with Checkpoint(sharded) as checkpoint:
        assert list(checkpoint.tensors) == ["x"]


def test_files_beside_those_of_the_index_are_not_read(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(b"anything")
    check(sharded)


def linked(sharded: Path, folder: Path, blobs: Path) -> Path:
    for directory in (folder, blobs):
        directory.mkdir(parents=True)
    for number, name in enumerate([ONE, TWO, INDEX]):
        (sharded / name).rename(blobs / str(number))
        (folder / name).symlink_to(Path(os.path.relpath(blobs, folder)) / str(number))
    return folder


def test_links_as_in_the_cache_of_the_hub(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("models--me--tiny")
    check(linked(sharded, cache / "snapshots" / "0123", cache / "blobs"))


def test_links_within_the_folder(sharded: Path) -> None:
    (sharded / ONE).rename(sharded / "other")
    (sharded / ONE).symlink_to("other")
    check(sharded)


def test_links_that_lead_out_of_the_folder(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Who made an index and links does not choose which files of this machine are weights."""
    parent = tmp_path_factory.mktemp("elsewhere")
    text = problems(linked(sharded, parent / "model", parent / "blobs"))
    assert text.count("is a link that leads out of its folder: put a copy of the file there") == 2


def problems(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        Checkpoint(folder)
    gc.collect()  # a file left open would be a ResourceWarning, which is an error
    text = str(caught.value)
    assert text.startswith(str(folder))
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "name",
    [
        "/etc/x.safetensors",
        "../x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "model.bin",
        "a\\b.safetensors",
        "a\0.safetensors",
    ],
)
def test_an_index_that_names_files_elsewhere(sharded: Path, name: str) -> None:
    (sharded / "sub").mkdir()
    for folder in [sharded / "sub", sharded.parent]:
        save_file({"d": C}, folder / "x.safetensors")
    index(sharded, a=ONE, b=ONE, c=TWO, d=name)
    text = problems(sharded)
    assert (
        f"not *.safetensors files in the folder itself: {name if name.isprintable() and name else repr(name)}" in text
    )
    (sharded.parent / "x.safetensors").unlink()


def test_all_problems_at_once(tmp_path: Path) -> None:
    for number in range(1, 5):
        save_file({"twice": A, f"own{number}": B, f"extra{number}": C}, tmp_path / f"{number}.safetensors")
    (tmp_path / "4.safetensors").write_bytes(b"short")
    index(
        tmp_path,
        twice="1.safetensors",
        own1="1.safetensors",
        own2="2.safetensors",
        own3="1.safetensors",
        own4="4.safetensors",
        away="5.safetensors",
        up="../6.safetensors",
        nowhere="3.safetensors",
    )
    text = problems(tmp_path)
    for part in [
        "tensors in more than one file: twice (1.safetensors, 2.safetensors), twice (1.safetensors, 3.safetensors)",
        f"tensors in a file but not in {INDEX}: extra1 (1.safetensors), extra2 (2.safetensors), extra3 (3.safetensors)",
        f"tensors not in the file that {INDEX} names: own3 (1.safetensors), nowhere (3.safetensors)",
        "4.safetensors: not a valid safetensors file: 5 bytes",
        "missing files, which must be downloaded again: 5.safetensors",
        "not *.safetensors files in the folder itself: ../6.safetensors",
    ]:
        assert part in text, text


def test_hostile_names_stay_on_one_short_line(sharded: Path) -> None:
    files = [f"{i}.safetensors" for i in range(10_000)]
    strange = ["a\nb.safetensors", "\ud800.safetensors", "x" * 100_000 + ".safetensors", "../" * 100_000]
    index(sharded, **{f"t{i}": name for i, name in enumerate(strange + files)})
    text = problems(sharded)
    assert len(text.encode()) < 5000
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": "\x1b[2J.safetensors", "\ud800": ONE}}))
    assert problems(sharded).isprintable()


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    save_file({f"t{i:04}": A for i in range(1000)}, tmp_path / "x.safetensors")
    index(tmp_path, a="x.safetensors")
    assert "t0009 (x.safetensors) and 990 more" in problems(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, "x"])
def test_an_index_of_another_form(sharded: Path, weight_map: object) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map must map" in problems(sharded)


def test_a_damaged_single_file(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(b"")
    assert "not a valid safetensors file" in problems(tmp_path)


def test_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / SINGLE).symlink_to("gone")
    assert f"downloaded again: {SINGLE}" in problems(tmp_path)


def test_several_files_and_no_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    save_file({"x": A}, sharded / "consolidated.safetensors")
    assert f"several safetensors files (consolidated.safetensors, {ONE}, {TWO})" in problems(sharded)


@pytest.mark.parametrize("name", ["model-00003-of-00002.safetensors", "model-00000-of-00002.safetensors", None])
def test_an_incomplete_set(sharded: Path, name: str | None) -> None:
    (sharded / INDEX).unlink()
    (sharded / TWO).rename(sharded / name if name else sharded / "away")
    assert "is not a complete set of 2" in problems(sharded)


def test_parts_of_two_sets(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / TWO).rename(sharded / "other-00002-of-00002.safetensors")
    assert "several safetensors files" in problems(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_code_in_pickled_weights_is_never_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    assert f"{name}: not a plain file of tensors" in problems(tmp_path)


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack"])
def test_weights_of_other_frameworks(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert f"no file of safetensors or torch, only {name}, which is not read; convert it" in problems(tmp_path)


def test_gguf(tmp_path: Path) -> None:
    (tmp_path / "q8.gguf").touch()
    assert "gguf_file='q8.gguf'" in problems(tmp_path)


def test_an_adapter(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "adapter_model.safetensors")
    assert "only an adapter" in problems(tmp_path)


def test_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights; expected model\.safetensors"):
        Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Checkpoint(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="not a folder"):
        Checkpoint(tmp_path / "file")
