"""What `ship` leaves behind: a whole folder or nothing."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import fsspec
import pytest

from jaxinfer.engine.compiled import Manifest
from jaxinfer.engine.load import local_programs
from jaxinfer.plan.ship import ship
from tests.plan.test_roofline import CONFIG

OPTIONS = {"max_num_seqs": 1, "max_num_batched_tokens": 4, "max_model_len": 16}
NAMES = [
    "decode_1.xla",
    "decode_forward_1.xla",
    "forward_4.xla",
    "full_decode_1.xla",
    "full_sample_1.xla",
    "guided_sample_1.xla",
    "load_table_1.xla",
    "manifest.json",
    "prepare_counts_1.xla",
    "prepare_masks_1.xla",
    "prepare_places_1.xla",
    "sample_1.xla",
    "score_4.xla",
    "zeros_1.xla",
]


@pytest.fixture(scope="module")
def programs():
    return local_programs(CONFIG, OPTIONS)


def names(url):
    fs, path = fsspec.core.url_to_fs(url)
    return sorted(file.rsplit("/", 1)[1] for file in fs.ls(path, detail=False)) if fs.exists(path) else []


class Stopped(Exception):
    pass


def stop_after(count):
    left = [count]

    def on_program():
        left[0] -= 1
        if not left[0]:
            raise Stopped

    return on_program


@pytest.fixture(params=["local", "memory"])
def output(request, tmp_path):
    return str(tmp_path / "a/b") if request.param == "local" else f"memory://{tmp_path}/b"


def test_all_or_nothing(programs, output):
    with pytest.raises(Stopped):
        ship(*programs, output, stop_after(2))
    assert "manifest.json" not in names(output)
    if not output.startswith("memory"):
        assert names(output) == names(output.rsplit("/", 1)[0]) == []
    done = ship(*programs, output, lambda: None)
    assert names(output) == NAMES
    fs, path = fsspec.core.url_to_fs(output)
    files = {name: fs.cat_file(f"{path}/{name}") for name in NAMES}
    assert (done.programs, done.bytes) == (
        len(NAMES) - 1,
        sum(len(files[name]) for name in NAMES if name != "manifest.json"),
    )
    # Once more: until it is done, what was there stays, or does not count.
    with pytest.raises(Stopped):
        ship(*programs, output, stop_after(4))
    assert ("manifest.json" in names(output)) == (not output.startswith("memory"))
    counted = []
    ship(*programs, output, lambda: counted.append(1))
    assert len(counted) == len(NAMES) - 1
    assert names(output) == NAMES
    again, before = (
        Manifest.parse(content) for content in (fs.cat_file(f"{path}/manifest.json"), files["manifest.json"])
    )
    signatures = [{name: program["signature"] for name, program in each.programs.items()} for each in (again, before)]
    assert signatures[0] == signatures[1]  # digests may differ: XLA does not always write the same bytes
    assert replace(again, programs={}) == replace(before, programs={})
    if not output.startswith("memory"):
        assert names(output.rsplit("/", 1)[0]) == ["b"]


@pytest.mark.slow
def test_the_persistent_cache_is_not_used(programs, tmp_path):
    """What comes out of it can't be run once it has been written and read again."""
    script = """
import sys, jax, json
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
from jaxinfer.engine.compiled import Folder, Manifest
from jaxinfer.engine.compiled import Manifest
from jaxinfer.engine.load import local_programs
from jaxinfer.engine.programs import Programs, State, Zeros
from jaxinfer.plan.ship import ship
Programs.keys = lambda self: [Zeros.key]
programs, sizes = local_programs(*json.loads(sys.argv[1]))
local_programs(*json.loads(sys.argv[1]))[0][Zeros.key].lower().compile()
before = jax.config.jax_enable_compilation_cache
ship(programs, sizes, sys.argv[2], lambda: None)
assert jax.config.jax_enable_compilation_cache is before
manifest = Manifest.parse(open(sys.argv[2] + "/manifest.json", "rb").read())
print(Folder(sys.argv[2], manifest, print).fetch(programs, Zeros.key)({}, State(), State())[1].slots.token)
"""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    for _ in range(2):
        command = [sys.executable, "-c", script, json.dumps([CONFIG, OPTIONS]), str(tmp_path / "out")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "[0 0]\n"), done.stderr
    assert list((tmp_path / "cache").iterdir())


def test_two_to_one_folder(programs, tmp_path):
    """Whoever is last, all in it is one's."""
    output, begun = str(tmp_path / "x"), []

    def meanwhile():
        if not begun:
            begun.append(True)
            ship(*programs, output, lambda: None)
            assert names(output) == NAMES

    ship(*programs, output, meanwhile)
    assert names(output) == NAMES
    assert os.listdir(tmp_path) == ["x"]


def test_other_folders_are_left_alone(programs, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="is there already, and is no folder of compiled programs"):
            ship(*programs, str(output), lambda: None)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ValueError, match="output abc://x: "):
        ship(*programs, "abc://x", lambda: None)
