"""Hostile and broken files around the pickle, in both forms of torch.save, and mutations of whole files: an error of
one line or the right tensors; nothing is imported, and memory and time are bounded."""

import itertools
import os
import pickletools
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.torch_files import (
    GOOD,
    MACHINE,
    MAGIC,
    STORAGE,
    VERSION,
    dictionary,
    dumps,
    legacy,
    literal,
    name,
    number,
    opened,
    packed,
    refusal,
    storage,
    tensor,
    text,
    zipped,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.bin"


# Archives ---------------------------------------------------------------------------------------------------------


def records(**more: bytes) -> dict[str, bytes]:
    return {"a/data.pkl": GOOD, "a/data/0": STORAGE, **more}


def changed(content: bytes, old: bytes, new: bytes, count: int = -1) -> bytes:
    assert old in content
    return content.replace(old, new, count)


def flagged(content: bytes, bit: int) -> bytes:
    """With a flag in each entry of the directory: what readers look at, or don't."""
    parts = content.split(b"PK\1\2")
    return b"PK\1\2".join([parts[0], *(part[:4] + bytes([part[4] | bit]) + part[5:] for part in parts[1:])])


def sized(content: bytes, size: int) -> bytes:
    """Whose first entry is said to have so many bytes."""
    at = content.index(b"PK\1\2") + 20
    return content[:at] + struct.pack("<II", size, size) + content[at + 8 :]


VALID = packed(records())
BOMB = packed({"a/data.pkl": b"\0" * 10_000_000}, zipfile.ZIP_DEFLATED)
ARCHIVES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "neither a zip archive nor"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4" + os.urandom(200), "neither a zip archive nor"),
    "tar": (b"storages".ljust(257, b"\0") + b"ustar".ljust(255, b"\0"), "neither a zip archive nor"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "neither a zip archive nor"),
    "HTML": (b"<!DOCTYPE html><html>", "neither a zip archive nor"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "neither"),
    "a half": (VALID[: len(VALID) // 2], "not a whole zip archive"),
    "a beginning": (b"PK\3\4", "not a whole zip archive"),
    "a zip bomb": (BOMB, "is compressed"),
    "a compressed record": (packed(records(), zipfile.ZIP_DEFLATED), "is compressed"),
    "an encrypted record": (flagged(VALID, 1), "is compressed or encrypted"),
    "a method that the record itself has not": (
        changed(VALID, b"PK\3\4\x14\0\0\0\0\0", b"PK\3\4\x14\0\0\0\x08\0", 1),
        "header",
    ),
    "another name in the record itself": (changed(VALID, b"a/data/0", b"a/data/1", 1), "has another header"),
    "another name in the directory": (
        VALID[: VALID.index(b"PK\1\2")] + VALID[VALID.index(b"PK\1\2") :].replace(b"a/data/0", b"a/data/1"),
        "has another header",
    ),
    "no data.pkl": (packed({"a/data/0": STORAGE}), "without data.pkl"),
    "a zip in a zip": (packed(records(**{"a/more.zip": VALID})), "records that torch.save does not write: more.zip"),
    "a zip instead of the pickle": (packed({"a/data.pkl": VALID}), "opcode PERSID"),
    "a second pickle": (packed(records(**{"a/more.pkl": GOOD})), "records that torch.save does not write: more.pkl"),
    "a script": (packed(records(**{"a/code/x.py": b"import os"})), "records that torch.save does not write: code/x.py"),
    "a storage of nobody": (packed(records(**{"a/data/7": b"cos\nsystem\n"})), "that no tensor is in: 7"),
    "traversal": (packed(records(**{"a/../../x": b""})), "records that torch.save does not write: ../../x"),
    "an absolute name": (packed(records(**{"/etc/passwd": b""})), "not in the folder of the others"),
    "another folder": (packed(records(**{"b/data/0": STORAGE})), "not in the folder of the others"),
    "no folder": (packed({"data.pkl": GOOD, "data/0": STORAGE}), "not in the folder of the others"),
    "something before": (b"x" * 10 + VALID, "neither a zip archive nor"),
    "an archive before": (VALID + VALID, "begins at byte"),
    "a pickle after the pickle": (packed(records() | {"a/data.pkl": GOOD + GOOD}), "after the end of the pickle"),
    "something after": (VALID + b"x" * 10, "something after it"),
    "a comment": (VALID[:-2] + struct.pack("<H", 3) + b"abc", "a zip archive with a comment"),
    "a length beyond the file": (sized(VALID, 2**31), "ends at byte"),
    "a length of all bits": (sized(VALID, 2**32 - 1), "ends at byte"),
    "a length less": (sized(VALID, 3), "begins at byte"),
    "big-endian": (packed(records(**{"a/byteorder": b"big"})), "byte order 'big'"),
    "an order of bytes of any length": (packed(records(**{"a/byteorder": b"x" * 10_000})), "byte order"),
    "a name of 60,000 characters": (packed(records(**{f"a/{'x' * 60_000}": b""})), "torch.save does not write"),
    "a name with a NUL": (
        packed(records(**{"a/xxxx": b""})).replace(b"a/xxxx", b"a/x\0yz"),
        "torch.save does not write",
    ),
    "a name that is no UTF-8": (packed(records(**{"a/xxxx": b""})).replace(b"a/xxxx", b"a/\xff\xffyz"), "utf-8"),
    "an older form without its number": (legacy(GOOD, {"0": STORAGE})[3:], "neither"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives(path: Path, case: str) -> None:
    content, message = ARCHIVES[case]
    assert message in refusal(path, content)


def test_a_record_twice(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for record, content in records().items():
            archive.writestr(zipfile.ZipInfo(record), content)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(zipfile.ZipInfo("a/data/0"), STORAGE)
    assert "is there twice" in refusal(path, path.read_bytes())


def test_records_that_overlap(path: Path) -> None:
    """Many entries of the directory for the same bytes."""
    at = VALID.index(b"PK\1\2")
    entry = VALID[at : VALID.index(b"PK\1\2", at + 4)]
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 50, 50, 50 * len(entry), at, 0)
    entries = b"".join(changed(entry, b"a/data.pkl", b"a/data/%03d" % i) for i in range(50))
    assert "another header" in refusal(path, VALID[:at] + entries + end)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 50, 50, 50 * len(entry), at, 0)
    assert "is there twice" in refusal(path, VALID[:at] + entry * 50 + end)


@pytest.mark.parametrize("size", [2**31, 2**32 - 2])
def test_a_huge_directory_costs_nothing(path: Path, size: int) -> None:
    """In a sparse file, in which it is there."""
    path.write_bytes(VALID)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, size, len(VALID), 0)
    with open(path, "r+b") as file:
        file.truncate(len(VALID) + size)
        file.seek(0, 2)
        file.write(end)
    tracemalloc.start()
    with pytest.raises(ValueError, match="bytes are asked for"):
        opened(path)
    assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    tracemalloc.stop()


DATA = struct.pack("<q", 12) + STORAGE
LEGACY: dict[str, tuple[bytes, str]] = {
    "another version": (dumps(MAGIC, 1002, MACHINE) + GOOD + dumps(["0"]) + DATA, "a version that is not 1001"),
    "True as a version": (dumps(MAGIC, True, MACHINE) + GOOD + dumps(["0"]) + DATA, "a version that is not 1001"),
    "big-endian": (dumps(MAGIC, VERSION, {"little_endian": False}) + GOOD + dumps(["0"]) + DATA, "little-endian"),
    "no machine": (dumps(MAGIC, VERSION, 3) + GOOD + dumps(["0"]) + DATA, "little-endian"),
    "a key twice": (dumps(MAGIC, VERSION, MACHINE) + GOOD + dumps(["0", "0"]) + DATA, "no list of names"),
    "a key that is a number": (dumps(MAGIC, VERSION, MACHINE) + GOOD + dumps([0]) + DATA, "no list of names"),
    "a key of nobody": (dumps(MAGIC, VERSION, MACHINE) + GOOD + dumps(["0", "1"]) + DATA, "that no tensor is in: 1"),
    "no keys": (dumps(MAGIC, VERSION, MACHINE) + GOOD + dumps([]), "storages that are missing: 0"),
    "nothing after": (dumps(MAGIC, VERSION, MACHINE) + GOOD, "more bytes are asked for"),
    "a length that differs": (legacy(GOOD, {"0": STORAGE}).replace(DATA[:8], struct.pack("<q", 11)), "another length"),
    "a negative length": (legacy(GOOD, {"0": STORAGE}).replace(DATA[:8], struct.pack("<q", -1)), "another length"),
    "an end too early": (legacy(GOOD, {"0": STORAGE})[:-1], "the file at"),
    "bytes after the end": (legacy(GOOD, {"0": STORAGE}) + b"\0", "the storages end at byte"),
    "a payload after the end": (legacy(GOOD, {"0": STORAGE}) + b"cos\nsystem\n(S'x'\ntR.", "the storages end at byte"),
    "a view of a storage": (
        legacy(GOOD, {"0": STORAGE}).replace(b"NtQ", b"(" + text("1") + number(0) + number(3) + b"ttQ"),
        "a persistent id that is no storage",
    ),
}


@pytest.mark.parametrize("case", LEGACY)
def test_the_older_form(path: Path, case: str) -> None:
    content, message = LEGACY[case]
    assert message in refusal(path, content)


def test_the_older_form_without_an_end_in_a_sparse_file(path: Path) -> None:
    path.write_bytes(dumps(MAGIC, VERSION, MACHINE) + b"\x80\x02")
    os.truncate(path, 2**40)  # zeros are no opcodes
    with pytest.raises(ValueError, match="byte 0x00 is no pickle opcode"):
        opened(path)


# Mutations --------------------------------------------------------------------------------------------------------


def seeds() -> list[tuple[Callable[..., bytes], bytes, dict[str, bytes]]]:
    """Two pickles in both forms."""
    plain = dictionary(
        weight=tensor(),
        turned=tensor(1, (2, 3), (1, 4)),
        mask=tensor(of=storage(5, "BoolStorage", "1"), shape=(5,), strides=(1,)),
        scalar=tensor(3, (), ()),
    )
    nested = dictionary(epoch=number(3), state_dict=plain[2:-1], note=b"N", lr=b"G?\xf0\0\0\0\0\0\0")
    kept = {"0": STORAGE, "1": bytes([1, 0, 1, 1, 0])}
    return [(form, value, kept) for form in (zipped, _legacy) for value in (plain, nested)]


def _legacy(value: bytes, storages: dict[str, bytes]) -> bytes:
    head = dumps(MAGIC, VERSION, MACHINE) + value.replace(b"tQ", b"NtQ") + dumps(list(storages))
    return head + struct.pack("<q", 12) + storages["0"] + struct.pack("<q", 5) + storages["1"]


def mutate(random: random.Random) -> bytes:
    form, value, storages = random.choice(seeds())
    kind = random.randrange(8)
    if kind < 3:  # opcodes of the pickle, in a file that is otherwise good
        starts = [position for *_, position in pickletools.genops(value)] + [len(value)]
        parts = [value[a:b] for a, b in itertools.pairwise(starts)]
        for _ in range(random.randint(1, 3)):
            at, other = random.randrange(len(parts)), random.randrange(len(parts))
            if kind == 0:
                parts[at], parts[other] = parts[other], parts[at]
            elif kind == 1:
                parts[at : at + random.randint(0, 2)] = [random.choice(OPCODES), parts[other]][: random.randint(0, 2)]
            else:
                part = bytearray(parts[at])
                part[random.randrange(len(part))] = random.choice([0, 1, 2, 255, random.randrange(256)])
                parts[at] = bytes(part)
        return form(b"".join(parts), storages)
    out = bytearray(form(value, storages))
    if kind in (3, 4):
        for _ in range(random.randint(1, 3)):
            out[random.randrange(len(out))] = random.choice([0, 1, 46, 82, 99, 255, random.randrange(256)])
    elif kind == 5:
        del out[random.randrange(len(out)) :]
    elif kind == 6:
        start = random.randrange(len(out))
        del out[start : start + random.randint(1, 16)]
    else:
        start = random.randrange(len(out))
        out[start:start] = random.choice(
            [random.randbytes(random.randint(1, 16)), out[start : start + random.randint(1, 64)]]
        )
    return bytes(out)


OPCODES = [op.code.encode("latin-1") for op in pickletools.opcodes] + [
    number(0), number(7), number(-1), number(2**40), text("a"), text("0"), b"(", name("os", "system"),
    name("torch", "LongStorage"), name("collections", "OrderedDict"), storage(), tensor(), b"\x85R",
]  # fmt: skip


@pytest.mark.parametrize("count", [500, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutations_give_an_error_or_the_right_tensors(path: Path, count: int) -> None:
    rng, accepted = random.Random(21), 0
    messages = []
    start = time.process_time()
    tracemalloc.start()
    try:
        for number in range(count):
            content = mutate(rng)
            path.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                got = opened(path)
            except (ValueError, OSError) as error:
                messages.append(str(error))
            else:
                accepted += 1
                assert got == literal(content), number
            assert tracemalloc.get_traced_memory()[1] - before < 2_000_000
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < count * 0.05
    assert all(message.startswith(str(path)) and "\n" not in message and len(message) < 1000 for message in messages)
    assert count / 50 < accepted < count / 2  # both ways are travelled


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200), form=st.sampled_from(["", "zip", "legacy"]))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes, form: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bin"
    made = {"": b"", "zip": zipped(b"\x80\x02" + content, {}), "legacy": legacy(b"\x80\x02" + content, {})}[form]
    path.write_bytes(made or content)
    with pytest.raises(ValueError, match=r"any\.bin: "):
        opened(path)
