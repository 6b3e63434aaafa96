"""Checkpoints for command lines."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(checkpoints) -> Path:
    return checkpoints("llama").folder


@pytest.fixture(scope="session")
def endless(model, tmp_path_factory) -> Path:
    """A model that no end-of-text stops, with room for minutes of text."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(model, folder)
    for name, change in {
        "config.json": {"max_position_embeddings": 10_000},
        "tokenizer_config.json": {"eos_token": None},
    }.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | change))
    return folder
