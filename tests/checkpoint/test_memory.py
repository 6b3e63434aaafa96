"""Weights in huge pages."""

import gc
import mmap
import weakref

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.checkpoint.memory import CHUNK, HUGE, LARGE, HugePages

RNG = np.random.default_rng(0)

needs_linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages")


def random(*shape, dtype=np.float32):
    return jax.device_put(RNG.normal(size=shape).astype(dtype))


@needs_linux
def test_one_after_the_other_and_unchanged():
    arrays = {
        "a": random(3, 5),
        "b": random(7, 1000, dtype=jax.numpy.bfloat16),
        "c": random(0, 4),
        "d": random(900, 900),
    }
    expected = {name: np.asarray(array) for name, array in arrays.items()}
    moved = HugePages().moved(dict(arrays))
    starts = [moved[name].unsafe_buffer_pointer() for name in "abd"]
    assert starts[0] % HUGE == 0
    assert starts[1:] == [starts[0] + 64, starts[0] + 64 + -(-7 * 1000 * 2 // 64) * 64]
    for name, array in moved.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])
        assert (array.unsafe_buffer_pointer() != arrays[name].unsafe_buffer_pointer()) or not array.size


@needs_linux
def test_more_than_a_chunk():
    size = LARGE // 4 - 64
    arrays = {str(i): random(size) for i in range(CHUNK // LARGE + 1)}
    expected = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in HugePages().moved(arrays).items():
        np.testing.assert_array_equal(array, expected[name])
    assert arrays == {}


@needs_linux
def test_on_a_mesh_and_what_is_large():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    split = jax.device_put(np.asarray(random(8, 6)), NamedSharding(mesh, PartitionSpec("a")))
    large = random(LARGE // 4)
    moved = HugePages().moved({"split": split, "large": large})
    assert moved["large"].unsafe_buffer_pointer() == large.unsafe_buffer_pointer()
    assert moved["split"].sharding == split.sharding
    np.testing.assert_array_equal(moved["split"], split)


@needs_linux
def test_is_freed_with_its_arrays(monkeypatch):
    chunks = []
    of_buffer = np.frombuffer

    def watched(memory, dtype):
        chunks.append(weakref.ref(memory))
        return of_buffer(memory, dtype)

    monkeypatch.setattr(np, "frombuffer", watched)
    moved = HugePages().moved({"a": random(10), "b": random(10)})
    del moved["a"]
    assert chunks[0]() is not None
    moved["b"].delete()
    del moved
    gc.collect()
    assert chunks[0]() is None


def test_a_system_without_them(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    array = np.ones(4)
    assert HugePages().copied(array) is array
