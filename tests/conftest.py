"""Hostile defaults for all tests: 8 fake CPU devices, strict dtype promotion, warnings are errors (pyproject.toml)."""

import atexit
import gc
import os
import shutil
import signal
import tempfile

from tests.devices import simulated

# Before JAX is imported anywhere. Programs that tests compile are kept for the session, not in the user's folder.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = simulated(8)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads wait for each other by spinning, and tiny models need none
if "JAXINFER_CACHE_DIR" not in os.environ:  # processes that run a part of the tests have it from the first one
    os.environ["JAXINFER_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxinfer-test-programs-")
    atexit.register(shutil.rmtree, os.environ["JAXINFER_CACHE_DIR"], ignore_errors=True)

import hypothesis
import jax
import pytest

from tests.cli.run import cli  # noqa: F401  (a fixture for all)
from tests.kept import keep

jax.config.update("jax_numpy_dtype_promotion", "strict")
# A shell that starts this in the background has Ctrl-C ignored, and what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


keep()
hypothesis.settings.register_profile("tests", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True, scope="module")
def what_stays() -> None:
    """Closing an engine collects garbage, and need not go through what torch, JAX and others keep each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """Makes (once) and finds the tiny checkpoints of `tests/checkpoints.py`."""
    from tests.checkpoints import Checkpoints

    kept = os.environ.get("JAXINFER_TEST_CHECKPOINTS")
    return Checkpoints(kept or tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch):
    """Makes a model's device take so many seconds a call."""
    from tests.slow import Slow

    return lambda llm, seconds=0.02: Slow(llm, monkeypatch, seconds)
