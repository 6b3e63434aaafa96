"""Jobs of two shards that are killed at random moments. A file of its own: it takes as long as test_killed.py does."""

import random

import pytest

from tests.batch.test_killed import jobs, large  # noqa: F401  (fixtures)


@pytest.mark.slow
def test_fifty_jobs_of_two_shards(large, tmp_path):  # noqa: F811
    kills = sum(large.kill_shards(random.Random(seed), tmp_path / str(seed)) for seed in range(50))
    print(f"50 jobs of two shards, {kills} kills, {large.identical} outputs the same to the last bit")
    assert kills >= 25
