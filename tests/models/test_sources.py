"""Where weights are found: what is read is what is written, whatever the expression, whole and in parts."""

import itertools

import numpy as np
import pytest

from jaxinfer.models.sources import Concat, Part, Stack, Tensor, Transposed, shape_of, slices, whole

RNG = np.random.default_rng(0)
A, B, C = Tensor("a"), Tensor("b"), Tensor("c")
CASES = {
    "itself": (A, (6, 4), {"a": (6, 4)}, lambda t: t["a"]),
    "a vector": (A, (6,), {"a": (6,)}, lambda t: t["a"]),
    "transposed": (Transposed(A), (6, 4), {"a": (4, 6)}, lambda t: t["a"].T),
    "rows of more": (Part(A, 2, 11), (6, 4), {"a": (11, 4)}, lambda t: t["a"][2:8]),
    "of a vector": (Part(A, 2, 11), (6,), {"a": (11,)}, lambda t: t["a"][2:8]),
    "columns of more": (Part(A, 2, 11, axis=1), (6, 4), {"a": (6, 11)}, lambda t: t["a"][:, 2:6]),
    "part of a transposed one": (Part(Transposed(A), 2, 11), (6, 4), {"a": (4, 11)}, lambda t: t["a"].T[2:8]),
    "a transposed part": (Transposed(Part(A, 2, 11)), (6, 4), {"a": (11, 6)}, lambda t: t["a"][2:6].T),
    "stacked": (Stack((A, B)), (2, 6, 4), {"a": (6, 4), "b": (6, 4)}, lambda t: np.stack([t["a"], t["b"]])),
    "stacked and transposed": (
        Stack((Transposed(A), Transposed(B))),
        (2, 6, 4),
        {"a": (4, 6), "b": (4, 6)},
        lambda t: np.stack([t["a"].T, t["b"].T]),
    ),
    "packed experts, the other way round": (
        Transposed(A),
        (2, 6, 4),
        {"a": (2, 4, 6)},
        lambda t: t["a"].swapaxes(1, 2),
    ),
    "half of packed experts": (Part(A, 6, 12, axis=1), (2, 6, 4), {"a": (2, 12, 4)}, lambda t: t["a"][:, 6:]),
    "joined": (
        Concat((A, B, C), (1, 2, 3)),
        (6, 4),
        {"a": (1, 4), "b": (2, 4), "c": (3, 4)},
        lambda t: np.concatenate([t["a"], t["b"], t["c"]]),
    ),
    "joined columns": (
        Concat((A, Transposed(B)), (1, 3), axis=1),
        (6, 4),
        {"a": (6, 1), "b": (3, 6)},
        lambda t: np.concatenate([t["a"], t["b"].T], axis=1),
    ),
    "stacks joined": (
        Concat((Stack((A, B)), Tensor("d")), (2, 4), axis=1),
        (2, 6, 4),
        {"a": (2, 4), "b": (2, 4), "d": (2, 4, 4)},
        lambda t: np.concatenate([np.stack([t["a"], t["b"]]), t["d"]], axis=1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_read_and_written(name):
    source, shape, shapes, expected = CASES[name]
    assert source.tensors(shape) == shapes
    tensors = {tensor: RNG.normal(size=size) for tensor, size in shapes.items()}
    weight = expected(tensors)
    assert weight.shape == shape

    def read(tensor, index):
        return tensors[tensor][index]

    for index in itertools.product(*([(0, size), (1, size), (0, size - 1), (size // 2, size)] for size in shape)):
        np.testing.assert_array_equal(source.read(index, read), weight[slices(index)])
    again = {tensor: np.full(size, np.nan) for tensor, size in shapes.items()}
    for region in source.regions(whole(shape)):
        piece = region.turned(weight[region.index])
        assert piece.shape == shape_of(region.stored)
        again[region.tensor][slices(region.stored)] = piece
    for region in [region.tensor for region in source.regions(whole(shape))]:
        written = ~np.isnan(again[region])
        np.testing.assert_array_equal(again[region][written], tensors[region][written])
    assert sum((~np.isnan(array)).sum() for array in again.values()) == weight.size


def test_nothing_is_copied_where_one_tensor_is_all():
    values = RNG.normal(size=(4, 6))
    got = Transposed(A).read(((1, 5), (0, 3)), lambda _, index: values[index])
    assert np.shares_memory(got, values)


def test_tensors_of_different_types():
    """What can't be held in the one is not rounded to it."""
    tensors = {"a": np.ones((2, 3), np.float16), "b": np.full((2, 3), 70000, np.float32)}
    got = Stack((A, B)).read(whole((2, 2, 3)), lambda name, index: tensors[name][index])
    assert got.dtype == np.float32
    assert got[1].max() == 70000
