"""Jobs of two shards that are killed at random moments. A file of its own: it takes as long as test_killed.py does."""

import random

from tests.batch.test_killed import MANY, jobs, large  # noqa: F401  (fixtures)


@MANY
def test_many_jobs_of_two_shards(large, tmp_path, count):  # noqa: F811
    before = large.identical
    kills = sum(large.kill_shards(random.Random(seed), tmp_path / str(seed)) for seed in range(count))
    print(f"{count} jobs of two shards, {kills} kills, {large.identical - before} outputs the same to the last bit")
    assert kills >= count // 2
