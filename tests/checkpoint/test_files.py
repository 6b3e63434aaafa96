"""Each bad JSON file is one clear line."""

import json
import os
from pathlib import Path

import pytest

from jaxinfer.checkpoint.files import check_folder, read_config, read_generation_config, read_json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: .* in line 1, column 1"),
        (b'{"a": 1,}', "not JSON"),
        (b'{\n"a": }', "in line 2, column 6"),
        (b"[1]", "must be a JSON object {...}, not a list"),
        (b"null", "not a NoneType"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xef\xbb\xbf{}", "not JSON"),
    ],
)
def test_bad_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_what_is_no_json_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "pipe.json")
    (tmp_path / "huge.json").touch()
    os.truncate(tmp_path / "huge.json", 2**40)
    with pytest.raises(ValueError, match="1099511627776 bytes"):
        read_json(tmp_path / "huge.json")


def test_folders(tmp_path: Path) -> None:
    assert check_folder(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        check_folder(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="not a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_config(tmp_path / "none")


def config(folder: Path, **fields: object) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    assert read_config(config(tmp_path, model_type="llama", x=1)) == {"model_type": "llama", "x": 1}
    # auto_map of a known type is not looked at: our own model is used
    assert read_config(config(tmp_path, model_type="gpt2", auto_map={}))["model_type"] == "gpt2"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has no model_type; `jaxinfer models` lists all"),
        ({"model_type": "lama"}, "model_type 'lama' is not supported, and 'llama' is; `jaxinfer models` lists all"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"model_type": "x" * 1000}, r"\(1002 characters\) is not supported"),
        ({"model_type": "mine", "auto_map": {"AutoModel": "mine.Mine"}}, "'mine' is not supported; .* never run"),
        ({"auto_map": {"AutoModel": "mine.Mine"}}, "has no model_type; .* never run"),
    ],
)
def test_unknown_models(tmp_path: Path, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_config(config(tmp_path, **fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("eos", "expected"), [(2, [2]), ([2, 7], [2, 7]), (0, [0])])
def test_generation_config(tmp_path: Path, eos: object, expected: list[int]) -> None:
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "top_k": 5}))
    assert read_generation_config(tmp_path) == {"eos_token_id": expected, "top_k": 5}


def test_generation_config_without_eos(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null, "top_k": 5}')
    assert read_generation_config(tmp_path) == {"top_k": 5}


@pytest.mark.parametrize("eos", ["2", 2.0, -1, True, [2, "7"], {"a": 1}])
def test_bad_eos(tmp_path: Path, eos: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match="eos_token_id is"):
        read_generation_config(tmp_path)
