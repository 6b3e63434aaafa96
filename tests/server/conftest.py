"""A tiny model behind a socket."""

import logging

import httpx2 as httpx
import pytest

from jaxinfer import LLM
from jaxinfer.server.config import ServerConfig
from jaxinfer.server.run import Background

OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 64}


@pytest.fixture(scope="session")
def served_llm(checkpoints):
    with LLM(checkpoints("llama").folder, **OPTIONS) as llm:
        yield llm


@pytest.fixture
def serve(served_llm):
    """Starts servers of the model, with these options."""
    started = []

    def start(llm=served_llm, **config):
        server = Background(
            llm, ServerConfig(**{"port": 0, "names": ("tiny", "other"), "drain_seconds": 5} | config), False
        )
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="module")
def server(served_llm):
    """One for all tests that change nothing of it."""
    logging.getLogger("jaxinfer.access").propagate = False
    with Background(served_llm, ServerConfig(port=0, names=("tiny", "other")), False) as server:
        yield server


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
