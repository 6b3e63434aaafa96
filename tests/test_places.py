"""Names that files say stay in their folder; places that users name are paths or URLs, and can be written."""

import os
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from jaxinfer.places import check_kept, check_new, inside, local, locate

OUTSIDE = [
    "/etc/passwd",
    "../secret",
    "a/../../secret",
    "..",
    ".",
    "",
    "a//b",
    "a/",
    "./a",
    "http://127.0.0.1/x",
    "gs://bucket/x",
    "file:///etc/passwd",
    "file:x",
    "reference::data:application/json;base64,e30=",
    "..\\secret",
    "a\0b",
    None,
    3,
    ["a"],
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_would_choose_a_place(tmp_path, name):
    with pytest.raises(ValueError, match=r"^manifest: weights is .*: it must be the name of something in ") as error:
        inside(tmp_path, name, "manifest: weights")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a", "a/b", "..a", "a b", "ä", "run[1]", "..a.."])
def test_names_of_what_is_in_the_folder(tmp_path, name):
    assert inside(tmp_path, name, "x") == tmp_path / name


def test_links(tmp_path):
    folder, other = tmp_path / "model", tmp_path / "model-2"
    (folder / "sub").mkdir(parents=True)
    other.mkdir()
    for directory in (folder, other):
        (directory / "file").touch()
    (folder / "within").symlink_to("file")
    (folder / "out").symlink_to("../model-2/file")
    (folder / "away").symlink_to(other)
    (folder / "gone").symlink_to("/nowhere/at/all")
    (tmp_path / "alias").symlink_to(folder)
    for directory in (folder, tmp_path / "alias", Path(os.path.relpath(folder))):
        assert inside(directory, "within", "x") == directory / "within"
        for name in ("out", "away/file", "gone"):
            with pytest.raises(ValueError, match=r"^x: .* is a link that leads out of its folder: put a copy"):
                inside(directory, name, "x")


def test_links_of_the_cache_of_the_hub(tmp_path):
    """Into the blobs of the same repository, and nowhere else."""
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for repository in ("models--me--tiny", "models--me--private"):
        (tmp_path / repository / "blobs").mkdir(parents=True)
        (tmp_path / repository / "blobs" / "b10b").touch()
    (snapshot / "mine").symlink_to("../../blobs/b10b")
    (snapshot / "other").symlink_to("../../../models--me--private/blobs/b10b")
    inside(snapshot, "mine", "x")
    with pytest.raises(ValueError, match="leads out"):
        inside(snapshot, "other", "x")


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("", "a name is missing"),
        ("file://", "a name is missing"),
        ("gs://", "a name is missing"),
        ("a::b", "a URL within another"),
        ("reference::data:application/json;base64,e30=", "a URL within another"),
        ("simplecache::gs://bucket/x", "a URL within another"),
        ("gs:/bucket/x", r"a URL that has lost a slash; give it as text, gs://\.\.\."),
        ("nosuch://bucket/x", "nosuch"),
        ("a\udcffb", "it is not UTF-8"),
    ],
)
def test_what_is_no_place(location, problem):
    with pytest.raises(ValueError, match=rf"^output .*: .*{problem}") as error:
        locate(location, "output")
    assert "\n" not in str(error.value)


def test_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for location, path in {
        "a": tmp_path / "a",
        "a/.": tmp_path / "a",
        "a//b/": tmp_path / "a/b",
        "run[1]": tmp_path / "run[1]",
        "a:b": tmp_path / "a:b",
        "~/a": "/home/me/a",
        f"file://{tmp_path}/a": tmp_path / "a",
        "/": "/",
    }.items():
        fs, result = locate(location, "output")
        assert isinstance(fs, LocalFileSystem)
        assert result == local(location, "output") == str(path)
    assert locate("memory://a/b/", "output")[1] == "/a/b"
    with pytest.raises(ValueError, match=r"^--plot memory://a: is not on this machine"):
        local("memory://a", "--plot")
    with pytest.raises(ValueError, match=r"^output memory://a: is gone when the command ends"):
        check_kept("memory://a", "output")
    check_kept("gs://a", "output")


def test_what_can_not_be_made_is_said_before(tmp_path):
    """Tried, and nothing is left of that."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("new", "new/and/deeper", "n" * 255):
        check_new(str(tmp_path / name), "x")
    for name, problem in {
        "file": "is there already",
        "dangling": "is there already",
        "dangling/x": "can't be made",
        "file/x": r"can't be made \(Not a directory\)",
        "n" * 256: r"can't be made \(File name too long\)",
        "a\0b": "can't be made",
    }.items():
        with pytest.raises(ValueError, match=f"^x: {problem}"):
            check_new(str(tmp_path / name), "x")
    with pytest.raises(ValueError, match=r"^x: can't be made in /proc \(.*\): give another name"):
        check_new("/proc/new/folder", "x")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]
