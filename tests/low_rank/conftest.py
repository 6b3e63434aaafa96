"""A tiny base with two adapters, loaded once."""

import pytest

from jaxinfer import LLM
from tests.adapters import write_adapter
from tests.plain import CONFIG, random_tensors, write_checkpoint

BASE = CONFIG | {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "dtype": "float32"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder with `base`, and `a`, `b` and `c` that are adapters of it."""
    folder = tmp_path_factory.mktemp("adapters")
    # Larger than weights are, so that texts differ.
    write_checkpoint(folder / "base", BASE, {name: 3 * tensor for name, tensor in random_tensors(BASE).items()})
    for seed, name in enumerate("abc"):
        write_adapter(folder / name, folder / "base", seed=seed)
    return folder


@pytest.fixture(scope="session")
def llm(folders):
    with LLM(folders / "base", adapters={name: folders / name for name in "ab"}, **OPTIONS) as llm:
        yield llm
