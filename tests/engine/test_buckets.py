"""The table of shapes: finite, and with room for whatever the scheduler may send."""

import pytest

from jaxinfer.engine.buckets import Buckets


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 64, 256])
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 512, 2048, 3000])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_every_count_fits_and_the_limits_are_the_largest(rows, tokens, platform):
    buckets = Buckets.make(rows, tokens, platform)
    by_rows = buckets.decode, buckets.full_decode, buckets.sample
    for table, limit in (*((table, rows) for table in by_rows), (buckets.tokens, tokens)):
        assert list(table) == sorted(set(table))
        assert table[-1] == limit
        for count in range(1, limit + 1):
            size = Buckets.fit(table, count)
            assert size >= count
            assert not any(count <= smaller < size for smaller in table)
    assert len(buckets.decode) <= (9 if platform == "cpu" else 4)
    assert set(buckets.full_decode) <= set(buckets.decode)
    assert len(buckets.full_decode) == (len(buckets.decode) + 1) // 2
    assert len(buckets.tokens) <= 8
    assert len(buckets.sample) <= 2


def test_the_table():
    buckets = Buckets.make(64, 512)
    assert buckets.decode == (1, 2, 4, 8, 16, 32, 64)
    assert buckets.tokens == (32, 64, 128, 256, 512)
    assert buckets.sample == (16, 64)
    assert buckets.full_decode == (1, 4, 16, 64)
    assert Buckets.make(256, 2048, "tpu").decode == (8, 32, 128, 256)
    assert Buckets.make(256, 2048, "gpu").full_decode == (32, 256)
    assert Buckets.make(4, 32, "tpu").decode == (4,)


@pytest.mark.parametrize("rows", [64, 128, 256, 512])
def test_there_are_not_many(rows):
    """On TPU each is an executable of 60 MB, beside the four that score and that make and prepare slots."""
    buckets = Buckets.make(rows, 2048, "tpu")
    rows = len(buckets.decode) + len(buckets.full_decode) + 2 * len(buckets.sample)
    assert rows + len(buckets.tokens) + 4 <= 20


def test_beyond_the_largest():
    with pytest.raises(ValueError, match="65 is more than the largest bucket, 64"):
        Buckets.fit(Buckets.make(64, 512).decode, 65)
