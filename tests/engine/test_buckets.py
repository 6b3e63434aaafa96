"""The table of shapes: finite, and with room for whatever the scheduler may send."""

import pytest

from jaxinfer.engine.buckets import Buckets


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 64, 256])
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 512, 2048, 3000])
def test_every_count_fits_and_the_limits_are_the_largest(rows, tokens):
    buckets = Buckets.make(rows, tokens)
    for table, limit in ((buckets.decode, rows), (buckets.sample, rows), (buckets.tokens, tokens)):
        assert list(table) == sorted(set(table))
        assert table[-1] == limit
        for count in range(1, limit + 1):
            size = Buckets.fit(table, count)
            assert size >= count
            assert not any(count <= smaller < size for smaller in table)
    assert len(buckets.decode) <= 9
    assert len(buckets.tokens) <= 8
    assert len(buckets.sample) <= 2


def test_the_table():
    buckets = Buckets.make(64, 512)
    assert buckets.decode == (1, 2, 4, 8, 16, 32, 64)
    assert buckets.tokens == (32, 64, 128, 256, 512)
    assert buckets.sample == (16, 64)


@pytest.mark.parametrize("rows", [64, 128, 256, 512])
def test_there_are_not_many(rows):
    """On TPU each is an executable of 60 MB, beside the three that score and that make and prepare slots."""
    buckets = Buckets.make(rows, 2048)
    assert len(buckets.decode) + len(buckets.tokens) + len(buckets.sample) + 3 <= 20


def test_beyond_the_largest():
    with pytest.raises(ValueError, match="65 is more than the largest bucket, 64"):
        Buckets.fit(Buckets.make(64, 512).decode, 65)
