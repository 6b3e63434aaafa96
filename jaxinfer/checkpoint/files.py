"""The JSON files of a checkpoint folder."""

import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxinfer.errors import CheckpointError
from jaxinfer.models.registry import STATIC, encoder_types, model_types, nearest
from jaxinfer.models.wrapped import lifted
from jaxinfer.quantization.stored import QUANTIZATION_FIELDS

MAX_JSON_BYTES = 100_000_000  # the largest tokenizers have about 35 MB


def short(value: object) -> str:
    """`value` on one line of bounded length: checkpoints may be hostile, messages are for people."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def some(names: Iterable[str], limit: int = 10) -> str:
    """Up to `limit` names, hostile ones clipped, and how many more there are."""
    names = [name if name.isprintable() and 0 < len(name) <= 120 else short(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """`folder` as a Path. Raises FileNotFoundError or NotADirectoryError."""
    path = Path(folder)
    if os.path.isdir(path):
        return path
    if os.path.lexists(path):
        raise NotADirectoryError(f"{path}: not a folder; give the folder with config.json and the weights in it")
    raise FileNotFoundError(f"{path}: no such folder")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in the file `path`, of at most 100 MB.

    Raises FileNotFoundError, and CheckpointError for a file that is not UTF-8, not JSON or not an object.
    """
    content = read_any_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must be a JSON object {{...}}, not a {type(content).__name__}")
    return content


def read_any_json(path: str | os.PathLike[str]) -> Any:
    """The same of any JSON value."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if status.st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: {status.st_size} bytes are more than the {MAX_JSON_BYTES} that are read as JSON"
            )
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file") from None
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: not usable as JSON: nested too deeply") from None
    except ValueError:  # Python reads no integer of more than 4,300 digits
        raise CheckpointError(f"{path}: not usable as JSON: it has an integer of thousands of digits") from None


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of `folder`, whose `model_type` must be one of the registry's.

    Code that comes with a checkpoint (`auto_map`) is never run: where `model_type` is known, our own model is used.
    Raises what `check_folder` and `read_json` raise, and CheckpointError for a missing or unknown `model_type`.
    """
    path = check_folder(folder) / "config.json"
    if not os.path.lexists(path):
        if os.path.lexists(path.with_name("adapter_config.json")):
            raise CheckpointError(f"{folder}: has only an adapter: jaxinfer merge BASE {folder} DST writes the model")
        raise FileNotFoundError(f"{path}: no such file; give the folder of a checkpoint in Hugging Face's format")
    config = lifted(read_json(path), *QUANTIZATION_FIELDS)
    model_type = config.get("model_type")
    if model_type in (*model_types(), *encoder_types(), STATIC):
        return config
    if model_type is None:
        problem = "has no model_type"
    else:
        problem = f"model_type {short(model_type)} is not supported"
    remote = "; it needs code of its own (auto_map), which is never run" if "auto_map" in config else ""
    raise CheckpointError(f"{path}: {problem}{remote}{nearest(model_type)}")


def read_generation_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """generation_config.json of `folder`, {} where there is none.

    `eos_token_id`, an id or a list of ids in the file, is always a list of ids in the result; null is left out.
    """
    path = check_folder(folder) / "generation_config.json"
    if not os.path.lexists(path):
        return {}
    config = read_json(path)
    eos = eos_token_ids(config, path)
    config.pop("eos_token_id", None)
    return config if eos is None else config | {"eos_token_id": eos}


def eos_token_ids(config: Mapping[str, Any], path: Path) -> list[int] | None:
    """What `config`, the content of `path`, has as `eos_token_id`, as a list; None where it has none."""
    eos = config.get("eos_token_id")
    if eos is None:
        return None
    ids = eos if isinstance(eos, list) else [eos]
    if not all(type(item) is int and 0 <= item < 2**31 for item in ids):
        raise CheckpointError(f"{path}: eos_token_id is {short(eos)}; it must be a token id or a list of token ids")
    return ids
