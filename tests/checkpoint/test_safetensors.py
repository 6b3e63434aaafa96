"""Our reader against the safetensors package, and against files that somebody has damaged."""

import json
import os
import random
import resource
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.checkpoint.safetensors import DTYPES, SafetensorsFile

RNG = np.random.default_rng(0)


def pack(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    """With the reference implementation, which knows ml_dtypes' types only by name and bytes."""
    names = {str(dtype): name for name, dtype in DTYPES.items()}
    named = {"bfloat16", "float8_e4m3fn", "float8_e5m2"}
    header, data = {}, b""
    if all(a.dtype.kind in "biufc" or str(a.dtype) in named for a in arrays.values()):
        safetensors.serialize_file(
            {
                k: safetensors.TensorSpec(dtype=a.dtype.name, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes)
                for k, a in arrays.items()
            },
            str(path),
            metadata,
        )
        return path
    for key, array in arrays.items():
        header[key] = tensor(names[str(array.dtype)], array.shape, (len(data), len(data) + array.nbytes))
        data += array.tobytes()
    path.write_bytes(pack(header, data))
    safetensors.deserialize(path.read_bytes())  # the reference takes it too
    return path


def sample(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if dtype == np.bool_:
        return RNG.integers(0, 2, shape).astype(np.bool_)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(RNG.integers(0, 256, size, np.uint8).tobytes(), dtype).reshape(shape)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    shapes = [(), (1,), (7,), (0,), (3, 0, 5), (5, 3), (2, 3, 5), (1, 1, 2, 1, 3)]
    arrays = {f"t{i}": sample(DTYPES[name], shape) for i, shape in enumerate(shapes)}
    with SafetensorsFile(write(tmp_path / "m.safetensors", arrays)) as file:
        assert file.tensors.keys() == arrays.keys()
        for key, array in arrays.items():
            info, got = file.tensors[key], file.read(file.tensors[key])
            assert (info.shape, info.dtype, info.nbytes) == (array.shape, array.dtype, array.nbytes)
            assert (got.shape, got.dtype) == (array.shape, array.dtype)
            assert got.tobytes() == array.tobytes()
            assert got.flags.c_contiguous
            assert got.flags.writeable
            assert got.size == 0 or got.ctypes.data % 64 == 0


def test_the_table_of_dtypes_says_what_the_reference_says(tmp_path: Path) -> None:
    """Names that torch knows: the same bytes mean the same numbers."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    values = torch.tensor([0.0, 1.0, -1.5, 448.0])
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
    kinds += [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int8, torch.int16, torch.int32, torch.int64]
    kinds += [torch.uint8, torch.bool, torch.complex64]
    tensors = {str(kind): values.clamp(-100, 100).to(kind) for kind in kinds if kind is not torch.uint8}
    tensors["torch.uint8"] = values.abs().clamp(0, 100).to(torch.uint8)
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
    with SafetensorsFile(tmp_path / "m.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        for name, expected in tensors.items():
            got = file.read(file.tensors[name])
            assert got.astype(np.complex64).tolist() == expected.to(torch.complex64).tolist(), name


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory):
    array = np.arange(6 * 5 * 4 * 3, dtype=np.int32).reshape(6, 5, 4, 3).astype(ml_dtypes.bfloat16)
    other = np.arange(9, dtype=np.int64)
    with SafetensorsFile(
        write(tmp_path_factory.mktemp("cube") / "m.safetensors", {"other": other, "cube": array})
    ) as file:
        yield file, array


bound = st.none() | st.integers(-8, 8)


@settings(max_examples=300, deadline=None)
@given(index=st.lists(st.builds(slice, bound, bound), max_size=4).map(tuple))
def test_a_part_is_what_numpy_says_and_no_other_byte_is_read(cube, index: tuple[slice, ...]) -> None:
    file, array = cube
    counted = []
    original = os.preadv

    def preadv(fd: int, buffers: list, offset: int) -> int:
        counted.append(original(fd, buffers, offset))
        return counted[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        got = file.read(file.tensors["cube"], index)
    expected = array[index]
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert got.tobytes() == expected.tobytes()
    assert got.size == 0 or got.ctypes.data % 64 == 0
    assert sum(counted) == expected.nbytes
    if len(index) <= 1:
        assert len(counted) <= 1  # rows of the first axis are one run


def test_reads_in_pieces(cube, monkeypatch: pytest.MonkeyPatch) -> None:
    file, array = cube
    monkeypatch.setattr("jaxinfer.checkpoint.tensors._PIECE", 7)
    assert file.read(file.tensors["cube"]).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "index", [(slice(1, None, 2),), (slice(None), slice(0, 3, 2)), (slice(None, None, 3), slice(1, 2))]
)
def test_steps(cube, index) -> None:
    file, array = cube
    np.testing.assert_array_equal(file.read(file.tensors["cube"], index), array[index])


@pytest.mark.parametrize("index", [(slice(None, None, 0),), (slice(None, None, -1),), (0,), (slice(None),) * 5])
def test_an_index_that_is_no_part_is_refused(cube, index) -> None:
    file, _ = cube
    with pytest.raises(ValueError, match=r"tensor 'cube'"):
        file.read(file.tensors["cube"], index)


def test_a_tensor_of_another_file_is_refused(cube, tmp_path: Path) -> None:
    file, _ = cube
    with (
        SafetensorsFile(write(tmp_path / "m.safetensors", {"cube": np.zeros(3)})) as other,
        pytest.raises(ValueError, match="not of this file"),
    ):
        other.read(file.tensors["cube"])


def test_a_file_cut_after_opening(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"a": np.zeros(100)})
    with SafetensorsFile(path) as file:
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(OSError, match="cut after opening"):
            file.read(file.tensors["a"])


def test_a_closed_file(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path / "m.safetensors", {"a": np.zeros(3)}))
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(file.tensors["a"])


D8 = b"\0" * 8
BAD = {
    "nothing": (b"", "0 bytes"),
    "half a length": (b"\0" * 7, "7 bytes"),
    "no header": (D8, "does not begin"),
    "a header beyond the file": (pack({}, length=3), "3 bytes, the file has 10"),
    "the greatest length": (pack({}, length=2**64 - 1), "18446744073709551615"),
    "not an object": (pack(b"[]"), "does not begin"),
    "leading space": (pack(b" {}"), "does not begin"),
    "not JSON": (pack(b"{,}"), "header: "),
    "two objects": (pack(b"{}{}"), "header: "),
    "not UTF-8": (pack(b'{"\xff": 1}'), "header: "),
    "a lone surrogate": (pack(b'{"\\ud800": 1}'), "header: "),
    "NaN": (pack(b'{"a": NaN}'), "NaN is not JSON"),
    "a long number": (pack(b'{"a": ' + b"1" * 5000 + b"}"), "header: "),
    "deeply nested": (pack(b'{"a": ' + b"[" * 100_000), "header: "),
    "a name twice": (pack(b'{"a": 1, "a": 2}'), "'a' is there twice"),
    "a field twice": (pack(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "'dtype' is there twice"),
    "metadata that is no text": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata that is no object": (pack({"__metadata__": "a"}), "__metadata__"),
    "an entry that is no object": (pack({"a": 1}), "exactly dtype"),
    "a field missing": (pack({"a": {"dtype": "F32", "shape": [2]}}, D8), "exactly dtype"),
    "a field more": (pack({"a": {**tensor(), "x": 1}}, D8), "exactly dtype"),
    "an unknown dtype": (pack({"a": tensor("F7")}, D8), "dtype 'F7'; known are BOOL"),
    "a dtype of another kind": (pack({"a": tensor(["F32"])}, D8), "dtype"),  # type: ignore[arg-type]
    "a negative size": (pack({"a": tensor(shape=[-2])}, D8), "shape"),
    "a fractional size": (pack({"a": tensor(shape=[2.0])}, D8), "shape"),
    "a boolean size": (pack({"a": tensor("F64", [True])}, D8), "shape"),
    "a shape that is a number": (pack({"a": tensor(shape=2)}, D8), "shape"),
    "too many axes": (pack({"a": tensor(shape=[1] * 33 + [2])}, D8), "shape"),
    "more than 2**63 bytes": (pack({"a": tensor(shape=[2**62, 2**62])}, D8), r"2\*\*63"),
    "an overflow to the right size": (pack({"a": tensor(shape=[2**63 - 1, 2**63 - 1, 2])}, D8), r"2\*\*63"),
    "an empty array of huge axes": (pack({"a": tensor(shape=[2**62, 2**62, 0], offsets=[0, 0])}), r"2\*\*63"),
    "three offsets": (pack({"a": tensor(offsets=[0, 8, 8])}, D8), "data_offsets"),
    "offsets in reverse": (pack({"a": tensor(offsets=[8, 0])}, D8), "data_offsets"),
    "negative offsets": (pack({"a": tensor(offsets=[-8, 0])}, D8), "data_offsets"),
    "too few bytes for the shape": (pack({"a": tensor(offsets=[0, 4])}, D8), r"\[2\] has 8 bytes"),
    "beyond the end": (pack({"a": tensor()}, D8[:4]), "end at byte"),
    "bytes after the last": (pack({"a": tensor()}, D8 + b"\0"), "end at byte"),
    "a hole": (pack({"a": tensor(), "b": tensor(offsets=[9, 17])}, b"\0" * 17), "'b' begins at byte"),
    "an overlap": (pack({"a": tensor(), "b": tensor(offsets=[4, 12])}, b"\0" * 12), "'b' begins at byte"),
    "the same bytes twice": (pack({"a": tensor(), "b": tensor()}, D8), "'b' begins at byte"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        SafetensorsFile(tmp_path / "m.safetensors")
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "m.safetensors"))
    assert "\n" not in text
    assert len(text) < 1000


def test_a_bool_must_be_0_or_1(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(pack({"a": tensor("BOOL", [3], [0, 3])}, b"\0\1\2"))
    with (
        SafetensorsFile(tmp_path / "m.safetensors") as file,
        pytest.raises(ValueError, match="other than 0 and 1"),
    ):
        file.read(file.tensors["a"])


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(IsADirectoryError):
        SafetensorsFile(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match="not a regular file"):
        SafetensorsFile(tmp_path / "pipe.safetensors")


def test_a_huge_header_that_is_not_there_costs_nothing(tmp_path: Path) -> None:
    """A sparse file of a terabyte with the longest header that the length allows."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(pack(b"", length=100_000_001))
    os.truncate(path, 2**40)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="limit"):
            SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# Fuzzing ------------------------------------------------------------------------------------------------------------


def mutate(content: bytes, random: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    out = bytearray(content)
    kind = random.randrange(10)
    if kind <= 1:  # bytes of the header
        for _ in range(random.randint(1, 3)):
            out[random.randrange(8, 8 + length)] = random.choice([random.randrange(256), *b'0123456789",:[]{}'])
    elif kind == 2:  # the length
        if random.random() < 0.5:
            out[random.randrange(8)] = random.randrange(256)
        else:
            out[:8] = struct.pack("<Q", max(0, length + random.randint(-9, 9)))
    elif kind == 3:
        del out[random.randrange(len(out)) :]
    elif kind == 4:
        out += random.randbytes(random.randint(1, 64))
    elif kind == 5:  # bytes anywhere, tensor data most of all
        out[random.randrange(8 + length, len(out))] = random.randrange(256)
    elif kind == 6:  # a stretch left out
        start = random.randrange(len(out))
        del out[start : start + random.randint(1, 16)]
    else:
        names = [name for name in header if name != "__metadata__"]
        first, second = random.choice(names), random.choice(names)
        if kind == 7:
            field = random.choice(["data_offsets", "shape", "dtype"])
            header[first][field], header[second][field] = header[second][field], header[first][field]
        elif kind == 8:
            header[first]["dtype"] = random.choice([*DTYPES, "F4", "", None, 7])
        else:
            values = header[first][random.choice(["shape", "data_offsets"])]
            if values:
                values[random.randrange(len(values))] = random.choice([-1, 0, 1, 2, 3, 2**31, 2**62, 2**63, 2**64, 0.5])
        return pack(header, data)
    return bytes(out)


def right_tensors(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """What the header that is there says, taken literally."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            str(DTYPES[entry["dtype"]]),
            entry["shape"],
            content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def test_200_mutations_give_an_error_or_the_right_tensors(tmp_path: Path) -> None:
    arrays = {
        "model.embed.weight": sample(np.dtype(ml_dtypes.bfloat16), (7, 6)),
        "model.layers.0.weight": sample(np.dtype(np.float32), (4, 5)),
        "model.layers.0.bias": sample(np.dtype(np.float32), (5,)),
        "mask": np.tril(np.ones((3, 3), np.bool_)),
        "scale": sample(np.dtype(np.float16), ()),
        "empty": sample(np.dtype(np.int8), (0, 4)),
    }
    path = write(tmp_path / "m.safetensors", arrays, {"format": "pt"})
    valid = path.read_bytes()
    rng = random.Random(20)
    mutations: set[bytes] = set()
    while len(mutations) < 200:
        mutations.add(mutate(valid, rng))
    mutations.discard(valid)
    accepted, messages = 0, []
    seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    tracemalloc.start()
    try:
        for content in sorted(mutations):
            path.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                with SafetensorsFile(path) as file:
                    got = {name: file.read(info) for name, info in file.tensors.items()}
            except (ValueError, OSError) as error:
                messages.append(str(error))
            else:
                accepted += 1
                literal = {name: (str(a.dtype), list(a.shape), a.tobytes()) for name, a in got.items()}
                assert literal == right_tensors(content)
                safetensors.deserialize(content)  # raises where the reference refuses what we took
            assert tracemalloc.get_traced_memory()[1] - before < 1_000_000
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - seconds < 30
    assert all(message.startswith(str(path)) and "\n" not in message for message in messages)
    assert 10 < accepted < 150  # both ways are travelled


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200) | st.binary(max_size=100).map(lambda text: pack(b"{" + text + b"}")))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    try:
        SafetensorsFile(path).close()
    except ValueError:
        return
    safetensors.deserialize(content)
