"""What a checkpoint folder says about its tokens, apart from the vocabulary itself.

Both generations of the Hugging Face layout are read: transformers 4 (`special_tokens_map.json`,
`added_tokens.json`, `additional_special_tokens`) and transformers 5 (`extra_special_tokens`, everything in
`tokenizer_config.json`).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from jaxinfer.errors import CheckpointError
from jaxinfer.models.registry import only_text
from jaxinfer.models.wrapped import with_text

__all__ = ["AddedToken", "TokenFiles", "model_token_id", "one_line", "read_json", "why_only_text"]

MAX_ID = 2**31 - 1  # ids are int32 on devices


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before the vocabulary's own segmentation runs.

    content: its text.
    special: `decode` leaves it out by default.
    lstrip, rstrip: the match swallows whitespace to its left, or right.
    single_word: it is matched only where no letter, digit or underscore is beside it.
    normalized: it is matched in the text as the normalizer leaves it.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


def one_line(error: object) -> str:
    """An error's text on one line, cut to a readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file. Raises CheckpointError when it is anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({one_line(error)}); download the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}; download the file again")
    return value


def _content(value: object) -> str | None:
    """A token is written as its text or as {"content": text, ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ID


def model_token_id(folder: Path, name: str) -> int | None:
    """`bos_token_id` and such as the config.json in a folder has them."""
    value = with_text(read_json(folder / "config.json")).get(name)
    if isinstance(value, list) and value:
        value = value[0]
    return value if _is_id(value) else None


def why_only_text(folder: Path | None) -> str:
    """What to say to who sends something else to the model in a folder."""
    return only_text({} if folder is None else read_json(folder / "config.json"))


class TokenFiles:
    """`tokenizer_config.json` and its older companions, read once.

    config   tokenizer_config.json, with special_tokens_map.json merged in
    named    "bos_token", "eos_token", ... -> the token's text (only those that are set)
    extra    the texts of further special tokens
    added    id -> AddedToken, for tokens that have an id in these files
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = read_json(folder / "tokenizer_config.json")
        older = read_json(folder / "special_tokens_map.json")
        # transformers reads the older map only for checkpoints that predate `added_tokens_decoder`.
        self.config = older | config if "added_tokens_decoder" in config else config | older
        self.named: dict[str, str] = {}
        self.extra: list[str] = []
        for key, value in self.config.items():
            if key.endswith("_token") and (content := _content(value)):
                self.named[key] = content
        for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
            values = self.config.get(key) or []
            if isinstance(values, dict):
                self.named.update({name: content for name, value in values.items() if (content := _content(value))})
            elif isinstance(values, list):
                self.extra += [content for value in values if (content := _content(value))]
            else:
                raise CheckpointError(f"{folder / 'tokenizer_config.json'}: {key} must be a list, found {values!r:.80}")
        self.added = self._added_tokens()

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self.folder / 'tokenizer_config.json'}: {name} must be true or false, found {value!r}"
            )
        return value

    def model_token_id(self, name: str) -> int | None:
        """`bos_token_id` and such as config.json has them: the only place where some old checkpoints say it."""
        return model_token_id(self.folder, name)

    def _added_tokens(self) -> dict[int, AddedToken]:
        special = {*self.named.values(), *self.extra}
        added: dict[int, AddedToken] = {}
        path = self.folder / "added_tokens.json"
        for text, token_id in read_json(path).items():
            if not _is_id(token_id) or not text:
                raise CheckpointError(f"{path}: expected token -> id, found {text!r:.80}: {token_id!r:.80}")
            added[token_id] = AddedToken(text, special=text in special)
        path = self.folder / "tokenizer_config.json"
        decoder = self.config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise CheckpointError(f"{path}: added_tokens_decoder must map ids to tokens, found {decoder!r:.80}")
        for key, value in decoder.items():
            content = _content(value)
            if not re.fullmatch("[0-9]{1,10}", key) or not _is_id(int(key)) or content is None:
                raise CheckpointError(f"{path}: added_tokens_decoder has a malformed entry {key!r:.80}: {value!r:.80}")
            flags = value if isinstance(value, dict) else {}
            # What has a role is special whatever its flag says, as in transformers.
            flagged = bool(flags.get("special")) or content in self.named.values()
            names = ("lstrip", "rstrip", "single_word", "normalized")
            added[int(key)] = AddedToken(content, flagged, *(bool(flags.get(n)) for n in names))
        return dict(sorted(added.items()))
