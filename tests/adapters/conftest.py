"""A tiny base with two adapters, loaded once."""

import pytest

from jaxinfer import LLM
from tests.adapters.made import write_adapter, write_base

OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "dtype": "float32"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder with `base`, and `a`, `b` and `c` that are adapters of it."""
    folder = tmp_path_factory.mktemp("adapters")
    write_base(folder / "base")
    for seed, name in enumerate("abc"):
        write_adapter(folder / name, seed)
    return folder


@pytest.fixture(scope="session")
def llm(folders):
    with LLM(folders / "base", adapters={name: folders / name for name in "ab"}, **OPTIONS) as llm:
        yield llm
