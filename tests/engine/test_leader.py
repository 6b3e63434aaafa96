"""What process 0 tells the others, and that what is told is done."""

import contextlib
import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from jaxinfer.attention import Table
from jaxinfer.engine.leader import Leader, pack, unpack
from jaxinfer.engine.programs import DecodeRows
from jaxinfer.sampling.arrays import SamplingArrays

KEY = ("decode", 3)


def call():
    """What the host gives a decoding call, and the same without its values."""
    rng = np.random.default_rng(0)
    row = rng.integers(0, 99, 3, np.int32)
    arguments = (
        DecodeRows(row, row, row, (Table(rng.integers(0, 99, (3, 5), np.int32), row), None)),
        SamplingArrays.of_rows([], 3),
        np.int32(7),
    )
    return arguments, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)


def test_a_call_as_bytes():
    arguments, abstract = call()
    other, arguments, abstract = ("sample", 3), (arguments, arguments), (abstract, abstract)
    header, _, data = pack([(KEY, arguments[0]), (other, arguments[1])]).partition(b"\n")
    assert json.loads(header) == ["call", [*KEY], [*other]]
    same = unpack(memoryview(data), abstract)
    assert jax.tree.structure(same) == jax.tree.structure(arguments)
    for leaf, other in zip(jax.tree.leaves(same), jax.tree.leaves(arguments), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(ValueError, match=f"^process 0 sent {len(wrong)} bytes for a call, which are not what"):
            unpack(memoryview(wrong), abstract)


def test_ctrl_c_does_not_come_between_telling_and_doing():
    done = []

    class Group:
        blamed = staticmethod(contextlib.nullcontext)

        def send(self, *_):
            done.append("told")
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    leader = Leader(Group())
    with pytest.raises(KeyboardInterrupt):
        leader.call([(KEY, ()), (KEY, ())], lambda calls: done.extend("done" for _ in calls))
    leader.wait()
    assert done == ["told", "done", "done"]
