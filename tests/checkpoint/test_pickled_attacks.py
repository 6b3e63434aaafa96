"""Hostile files of torch.save: an error of one line or the right tensors; nothing is imported, and memory and time are
bounded. The tricks are those that are published of pickle, of torch's archives, and of scanners that were passed."""

import itertools
import os
import pickle
import pickletools
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.checkpoint import unpickle
from jaxinfer.checkpoint.pickled import PickledFile
from tests.checkpoint.torch_files import (
    MACHINE,
    MAGIC,
    STORAGE,
    VERSION,
    dictionary,
    legacy,
    literal,
    name,
    number,
    packed,
    storage,
    tensor,
    text,
    watched,
    write,
    zipped,
)

Found = dict[str, tuple[str, tuple[int, ...], bytes]]


def opened(path: Path) -> Found:
    """What a file gives, with nothing run meanwhile."""
    with watched() as events:
        try:
            with PickledFile(path) as file:
                got = {name: file.read(info) for name, info in file.tensors.items()}
        finally:
            assert events == []
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in got.items()}


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(ValueError) as caught:
            opened(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20 + 60 * len(content)
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 5
    message = str(caught.value)
    assert message.startswith(f"{path}: not a plain file of tensors: ")
    assert "\n" not in message
    assert len(message) < 1000
    return message.removeprefix(f"{path}: not a plain file of tensors: ")


def both(path: Path, value: bytes) -> set[str]:
    """What is said of this pickle in the two forms."""
    kept = {"0": STORAGE} if b"FloatStorage" in value else {}
    return {refusal(path, form(value, kept)) for form in (zipped, legacy)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.bin"


A = np.frombuffer(STORAGE, np.float32).reshape(3, 4)
GOOD = dictionary(a=tensor())


def test_the_good_one(path: Path) -> None:
    """The attacks below are changes of it."""
    for form in (zipped, legacy):
        write(path, form(GOOD, {"0": STORAGE}))
        assert opened(path) == literal(path.read_bytes()) == {"a": ("float32", (3, 4), STORAGE)}


# Code -------------------------------------------------------------------------------------------------------------

CALLS = [
    "os.system", "posix.system", "nt.system", "os.popen", "os.execv", "subprocess.Popen", "subprocess.check_output",
    "pty.spawn", "builtins.eval", "builtins.exec", "builtins.__import__", "builtins.getattr", "builtins.compile",
    "builtins.open", "__builtin__.eval", "importlib.import_module", "runpy.run_path", "runpy._run_code",
    "code.InteractiveInterpreter", "timeit.timeit", "cProfile.run", "profile.run", "pdb.run", "bdb.Bdb.run",
    "idlelib.pyshell.ModifiedInterpreter.runcode", "pip.main", "pip._internal.main", "webbrowser.open", "ctypes.CDLL",
    "socket.create_connection", "httplib.HTTPSConnection", "urllib.request.urlopen", "shutil.rmtree",
    "pathlib.Path.write_text", "io.open", "pickle.loads", "_pickle.loads", "marshal.loads", "shelve.open",
    "dill.loads", "joblib.load", "cloudpickle.loads", "types.FunctionType", "types.CodeType", "functools.partial",
    "operator.attrgetter", "operator.methodcaller", "copyreg._reconstructor", "copy_reg._reconstructor",
    "_codecs.encode", "codecs.decode", "base64.b64decode", "bytes.fromhex",
    "lib2to3.pgen2.pgen.ParserGenerator.make_label", "distutils.file_util.write_file", "ensurepip._run_pip",
    "logging.config._resolve", "test.support.script_helper.assert_python_ok", "multiprocessing.util.spawnv_passfds",
    "asyncio.unix_events._UnixSubprocessTransport._start", "numpy.testing._private.utils.runstring",
    "numpy.core.multiarray._reconstruct", "numpy.f2py.crackfortran.getlincoef", "pandas.read_pickle",
    "pandas.io.parsers.readers.read_csv", "torch.load", "torch.hub.load", "torch.jit.load",
    "torch.package.PackageImporter", "torch.storage._load_from_bytes", "torch.utils.collect_env.run",
    "torch._inductor.codecache.compile_file", "torch._dynamo.guards.GuardBuilder.get",
    "torch.distributed.rpc.internal._InternalRPCPickler", "torch.serialization._get_layout",
    "torch.nn.modules.linear.Linear", "torch._utils._rebuild_device_tensor_from_numpy",
    "torch._utils._rebuild_wrapper_subclass", "torch._utils._import_dotted_name", "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_nested_tensor", "transformers.utils.get_file",
    "mlflow.projects.backend.local._run_entry_point", "cffi.FFI", "sklearn.svm.SVC", "xgboost.Booster",
    "builtins.print.__class__.__base__.__subclasses__", "collections.OrderedDict.__reduce__",
    "torch.Size.__init__.__globals__", "collections.OrderedDict.fromkeys",
    "torch._utils._rebuild_tensor_v2.__globals__", "collections._sys.modules", "collections.abc.sys",
    "torch._utils.torch.os.system", "torch.os.system",
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", ["GLOBAL", "STACK_GLOBAL", "memo"])
def test_names_are_not_looked_up(path: Path, call: str, how: str) -> None:
    module, attribute = call.rsplit(".", 1)
    if how == "GLOBAL":
        pushed = name(module, attribute)
    elif how == "STACK_GLOBAL":
        pushed = text(module) + text(attribute) + b"\x93"
    else:  # remembered out of order, and behind names that are known
        pushed = b"]" + text(attribute) + b"q\x07a" + text(module) + b"q\x05a" + text("torch") + b"q\x06a"
        pushed += b"h\x05h\x07\x93"
    value = b"\x80\x02" + pushed + text("touch x") + b"\x85R."
    assert both(path, value) == {
        f"it asks for {module + '.' + attribute!r}, and nothing that a pickle names is imported or called: tensors, "
        "OrderedDict and plain values are read; download it again, or, where you trust its writer, load it with torch "
        "and save its state_dict() alone, best as safetensors"
    }


SYSTEM = b"\x80\x02"  # what the pickles below begin with
TRICKS: dict[str, tuple[bytes, str]] = {
    "protocol 0": (b"cos\nsystem\n(S'touch x'\ntR.", "it asks for 'os.system'"),
    "INST": (SYSTEM + b"(" + text("x") + b"ios\nsystem\n.", "opcode INST"),
    "OBJ": (SYSTEM + b"(" + name("torch", "Size") + text("x") + b"o.", "opcode OBJ"),
    "NEWOBJ": (SYSTEM + name("torch", "Tensor") + b")\x81.", "opcode NEWOBJ"),
    "NEWOBJ_EX": (SYSTEM + name("torch", "Size") + b")}\x92.", "opcode NEWOBJ_EX"),
    "EXT1": (SYSTEM + b"\x82\x01.", "opcode EXT1"),
    "EXT2": (SYSTEM + b"\x83\x01\x00.", "opcode EXT2"),
    "EXT4": (SYSTEM + b"\x84\x01\x00\x00\x00.", "opcode EXT4"),
    "PERSID": (SYSTEM + b"Pstorage\n.", "opcode PERSID"),
    "texts of protocol 0": (SYSTEM + b"Vos\np0\n0Vsystem\np1\n0g0\ng1\n\x93.", "opcode UNICODE"),
    "a text with escapes": (SYSTEM + b"S'\\x6fs'\n.", "opcode STRING"),
    "an escape in a name": (SYSTEM + b"c\\x6fs\nsys\\dtem\n.", "it asks for"),
    "a long number": (SYSTEM + b"L" + b"9" * 5000 + b"L\n.", "opcode LONG"),
    "DUP": (SYSTEM + b"]2.", "opcode DUP"),
    "POP": (SYSTEM + b"]0.", "opcode POP"),
    "bytes": (SYSTEM + b"C\x01x.", "opcode SHORT_BINBYTES"),
    "a buffer": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "a bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".", "opcode BYTEARRAY8"),
    "a frozen set": (b"\x80\x04(\x91.", "opcode FROZENSET"),
    "a call of what is no name": (SYSTEM + text("os.system") + text("x") + b"\x85R.", "a call of a value of type str"),
    "a call of a type": (SYSTEM + name("torch", "Tensor") + b")R.", "a call of torch.Tensor"),
    "a call of a storage": (
        SYSTEM + name("torch", "FloatStorage") + b"J\0\0\0\x40\x85R.",
        "a call of torch.FloatStorage",
    ),
    "a call of a result": (SYSTEM + name("collections", "OrderedDict") + b")R)R.", "a call of a value of type Ordered"),
    "a call of a tensor": (SYSTEM + tensor() + b")R.", "a call of a tensor"),
    "arguments that are no tuple": (SYSTEM + name("torch", "Size") + b"]R.", "a call of torch.Size"),
    "a tensor made by another name": (
        SYSTEM
        + name("torch._tensor", "_rebuild_from_type_v2")
        + b"("
        + name("torch", "Size")
        + name("torch", "Tensor")
        + b")NtR.",
        "a tensor made by torch.Size",
    ),
    "a tensor of another type": (
        SYSTEM
        + name("torch._tensor", "_rebuild_from_type_v2")
        + b"("
        + name("torch._utils", "_rebuild_tensor")
        + name("torch", "Size")
        + b")NtR.",
        "a tensor of the type torch.Size",
    ),
    "a Parameter of a name": (
        SYSTEM + name("torch._utils", "_rebuild_parameter") + name("torch", "Size") + b"NN\x87R.",
        "a Parameter of torch.Size",
    ),
    "too many arguments": (SYSTEM + name("torch", "Size") + b"NN\x86R.", "torch.Size with 2 arguments"),
    "BUILD with __setstate__": (
        SYSTEM
        + name("torch._utils", "_rebuild_tensor_v2")
        + b"}"
        + text("__setstate__")
        + name("torch", "Size")
        + b"sb.",
        "sets attributes of torch._utils._rebuild_tensor_v2",
    ),
    "BUILD with slots": (SYSTEM + name("torch", "Size") + b"N}\x86b.", "sets attributes of torch.Size"),
    "BUILD of a tensor": (SYSTEM + tensor() + b"}b.", "sets attributes of a tensor"),
    "BUILD of a dict": (SYSTEM + b"}}b.", "sets attributes of a value of type dict"),
    "BUILD with no state": (SYSTEM + name("collections", "OrderedDict") + b")R(NNtb.", "sets attributes of"),
    "attributes of an OrderedDict's class": (
        SYSTEM + name("collections", "OrderedDict") + b"}" + text("__reduce__") + b"Nsb.",
        "sets attributes of collections.OrderedDict",
    ),
    "SETITEM of a tensor": (SYSTEM + tensor() + number(0) + number(1) + b"s.", "items are set in a tensor"),
    "SETITEM of a storage": (
        SYSTEM + storage() + number(0) + number(1) + b"s.",
        "items are set in a value of type Storage",
    ),
    "SETITEMS of a name": (SYSTEM + name("torch", "Size") + b"(NNu.", "items are set in torch.Size"),
    "APPEND to a name": (SYSTEM + name("torch", "Size") + b"Na.", "items are appended to torch.Size"),
    "APPENDS to a tuple": (SYSTEM + b")(Ne.", "items are appended to a value of type tuple"),
    "a name that is a tensor": (SYSTEM + tensor() + text("x") + b"\x93.", "a name that is no text"),
    "a persistent id that is text": (SYSTEM + text("storage") + b"Q.", "a persistent id that is no storage"),
    "a module with its source": (
        SYSTEM + b"(" + text("module") + name("torch", "Size") + text("a.py") + text("import os") + b"tQ.",
        "a module with its source",
    ),
    "a storage of a name": (SYSTEM + storage(kind="Size") + b".", "a storage of 12 'torch.Size'"),
    "a storage of less than nothing": (SYSTEM + storage(-1) + b".", "a storage of -1"),
    "a key that is a tuple": (SYSTEM + b"})Ns.", "a value of type tuple as a key"),
    "a key that is a tensor": (SYSTEM + b"}" + tensor() + b"Ns.", "a tensor as a key"),
    "a key twice": (dictionary(a=tensor()).replace(b"u.", text("a") + b"Nu."), "key 'a' is there twice"),
    "an odd number of items": (SYSTEM + b"}(" + text("a") + b"N" + text("b") + b"u.", "a key without a value"),
    "an OrderedDict of no pairs": (SYSTEM + name("collections", "OrderedDict") + text("ab") + b"\x85R.", "no pairs"),
    "a pickle in a list of itself": (SYSTEM + b"]q\0h\0a.", "a value of type list instead of"),
    "a dictionary in itself": (SYSTEM + b"}q\0" + text("model") + b"h\0s.", "'model' is a value of type dict"),
    "a state dict of itself": (
        SYSTEM + b"}q\0" + text("state_dict") + b"h\0s.",
        "'state_dict' is a value of type dict",
    ),
    "a memo that is empty": (SYSTEM + b"h\x05.", "nothing is remembered as 5"),
    "an empty stack": (SYSTEM + b"R.", "opcode REDUCE finds too little on the stack"),
    "what is before a mark": (SYSTEM + name("torch", "Size") + b")(R.", "opcode REDUCE finds too little on the stack"),
    "no mark": (SYSTEM + b"Nt.", "without its MARK"),
    "more than one value": (SYSTEM + b"NN.", "ends with more than one value"),
    "a mark that stays": (SYSTEM + b"N(N.", "ends with more than one value"),
    "protocol 1": (b"\x80\x01N.", "pickle protocol 1"),
    "protocol 6": (b"\x80\x06N.", "pickle protocol 6"),
    "no opcode": (SYSTEM + b"\xff.", "byte 0xff is no pickle opcode"),
    "a payload before a broken stream": (
        SYSTEM + name("posix", "system") + text("x") + b"\x85R" + b"\xff\xff",
        "it asks for 'posix.system'",
    ),
    "a name without an end": (SYSTEM + b"c" + b"x" * 5000, "a name without an end"),
    "a name of 5,000 characters": (SYSTEM + name("x" * 5000, "y") + b".", "a name without an end"),
    "a name that is no ASCII": (SYSTEM + b"c\xd0\xbes\nsystem\n.", "'ascii' codec"),
    "a text that is no UTF-8": (SYSTEM + b"X\x01\0\0\0\xff.", "'utf-8' codec"),
    "a text of Python 2 that is no UTF-8": (SYSTEM + b"U\x01\xff.", "'utf-8' codec"),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks(path: Path, trick: str) -> None:
    value, message = TRICKS[trick]
    for said in both(path, value):
        assert message in said


# Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opcode",
    [
        b"X" + struct.pack("<I", 2**32 - 1),
        b"\x8d" + struct.pack("<Q", 2**62),
        b"\x8d" + struct.pack("<Q", 2**64 - 1),
        b"T" + struct.pack("<i", 2**31 - 1),
        b"T" + struct.pack("<i", -1),
        b"\x8c\xff",
        b"U\xff",
        b"\x8a\xff",
        b"\x8b" + struct.pack("<i", 2**31 - 1),
    ],
)
def test_lengths_beyond_the_file(path: Path, opcode: bytes) -> None:
    both(path, b"\x80\x04" + opcode)
    path.write_bytes(zipped(b"\x80\x04" + opcode, {}))
    os.truncate(path, 2**40)  # a sparse file: the length is there
    with pytest.raises(ValueError):
        opened(path)
    path.write_bytes(legacy(b"\x80\x04" + opcode, {}))
    os.truncate(path, 2**40)
    tracemalloc.start()
    with pytest.raises(ValueError):
        opened(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_frame_and_a_memo_of_any_size_cost_nothing(path: Path) -> None:
    value = b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"Nr" + struct.pack("<I", 2**32 - 1) + b"."
    assert all("NoneType instead" in said for said in both(path, value))


def test_a_billion_laughs(path: Path) -> None:
    """A list that holds another twice, which holds a third twice, a hundred deep; and the same of tuples, as a key."""
    lists = b"\x80\x02(]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(100)) + b"t."
    assert all("tuple instead of" in said for said in both(path, lists))
    tuples = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(200))
    value = b"\x80\x02()q\0" + tuples + b"t."
    assert all("tuple instead of" in said for said in both(path, value))
    value = b"\x80\x02}()q\0" + tuples + b"t" + b"Ns."
    assert all("type tuple as a key" in said for said in both(path, value))
    value = b"\x80\x02(" + b")q\0" + tuples + b"t" + b"Q."
    assert all("no storage" in said for said in both(path, value))


def test_many_opcodes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "MAX_OPCODES", 10_000)
    for opcode in (b"}", b"]", b"(", b"N\x94", b"(t", b"}q\0"):
        assert all("more than 10000 opcodes" in said for said in both(path, b"\x80\x04" + opcode * 20_000))
    often = (
        name("collections", "OrderedDict")
        + b"q\0]("
        + b"".join(b"(" + text(f"{i}") + b"Nt" for i in range(500))
        + b"eq\1"
    )
    assert all("more than 10000 opcodes" in said for said in both(path, b"\x80\x02" + often + b"h\0h\1\x85R" * 2_000))
    often = name("torch", "Size") + b"q\0(" + number(1) * 3_000 + b"tq\1"
    assert all("at most 32 sizes" in said for said in both(path, b"\x80\x02" + often + b"h\0h\1\x85R" * 1_000))
    deep = b"\x80\x02" + b"]" * 4_000 + b"a" * 3_999 + b"."  # and freed again, without recursion
    assert all("list instead of" in said for said in both(path, deep))
    deep = b"\x80\x02N" + b"\x85" * 9_000 + b"."
    assert all("tuple instead of" in said for said in both(path, deep))


@pytest.mark.slow
@pytest.mark.parametrize(
    "opcode", [b"}", b"]\x94", b"(", b"N\x94", b"G\0\0\0\0\0\0\0\1\x94", b"(}t\x94", b"ctorch\nSize\n"]
)
def test_as_many_opcodes_as_there_may_be(path: Path, opcode: bytes) -> None:
    """Seconds, and less than a gigabyte."""
    content = zipped(b"\x80\x04" + opcode * 2_000_000, {})
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(ValueError, match="more than 2000000 opcodes"):
        opened(path)
    assert time.process_time() - start < 15


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (tensor(1), "reaches to element 12 of storage '0', which has 12"),
        (tensor(0, (4, 4)), "reaches to element 15"),
        (tensor(0, (3, 4), (5, 1)), "reaches to element 13"),
        (tensor(0, (2**62, 2), (0, 0)), r"2**63 bytes"),
        (tensor(0, (2**62, 2**62, 0), (0, 0, 0)), r"2**63 bytes"),
        (tensor(0, (2**28,), (0,)), "repeats its values to 1073741824 bytes"),
        (tensor(0, (3,), (4, 1)), "1 axes with 2 strides"),
        (tensor(0, (1,) * 40, (1,) * 40), "not a tuple of at most 32 sizes"),
        (tensor(0, (-1, 4)), "shape: not a tuple of sizes"),
        (tensor(0, (3, 4), (-4, 1)), "strides: not a tuple of sizes"),
        (tensor(-1), "offset: not a tuple of sizes"),
        (tensor(2**63), "offset: not a tuple of sizes"),
        (tensor(13, (0,), (1,)), "reaches to element"),
        (tensor(of=storage(13)), "storage '0' has 48 bytes"),
        (tensor(of=storage(2**40)), "storage '0'"),
        (tensor(of=storage(2**61)), "storage '0'"),
        (tensor(of=storage(2**63)), "a storage of 9223372036854775808"),
        (tensor(of=storage(11)), "reaches to element 11"),
        (tensor(of=storage(12, "LongStorage")), "storage '0'"),
        (tensor(of=storage(12, "ComplexDoubleStorage")), "it asks for 'torch.ComplexDoubleStorage'"),
        (tensor(of=storage(12, key="1")), "storages that are missing: 1; that no tensor is in: 0"),
        (tensor(of=storage(12, key="../0")), "storages that are missing: ../0"),
        (tensor(of=storage(12, key="/etc/passwd")), "storages that are missing: /etc/passwd"),
        (tensor(of=text("x")), "a tensor of a value of type str instead of a storage"),
        (tensor() + text("b") + tensor(of=storage(6, "LongStorage")), "storage '0' is there twice"),
    ],
)
def test_views_stay_within_their_storages(path: Path, value: bytes, message: str) -> None:
    said = refusal(path, zipped(dictionary(a=value), {"0": STORAGE}))
    assert message in said
    said = refusal(path, legacy(dictionary(a=value), {"0": STORAGE}))
    assert message in said or "storage '0'" in said


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


def dumps(*values: object) -> bytes:
    return b"".join(pickle.dumps(value, 2) for value in values)


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


def test_strides_of_axes_that_have_one_index_are_any(path: Path) -> None:
    for shape, strides in (((1, 12), (2**62, 1)), ((12, 1), (1, 2**63 - 1)), ((1, 1), (0, 7))):
        write(path, zipped(dictionary(a=tensor(0, shape, strides)), {"0": STORAGE}))
        assert opened(path) == {"a": ("float32", shape, STORAGE[: 4 * shape[0] * shape[1]])}


def test_bools_are_0_or_1(path: Path) -> None:
    write(path, zipped(dictionary(a=tensor(of=storage(12, "BoolStorage"))), {"0": bytes(range(12))}))
    with pytest.raises(ValueError, match="other than 0 and 1"):
        opened(path)


def test_what_python_2_wrote(path: Path) -> None:
    """Short texts, a list of pairs, `_rebuild_tensor` without hooks, torch.Size."""
    size = name("torch", "Size") + b"(" + number(3) + number(4) + b"t\x85R"
    arguments = (
        storage().replace(text("storage"), b"U\x07storage") + number(0) + size + b"(" + number(4) + number(1) + b"t"
    )
    made = name("torch._utils", "_rebuild_tensor") + b"(" + arguments + b"tR"
    value = b"\x80\x02" + name("collections", "OrderedDict") + b"]](U\x01a" + made + b"ea\x85R."
    for form in (zipped, legacy):
        write(path, form(value, {"0": STORAGE}))
        assert opened(path) == {"a": ("float32", (3, 4), STORAGE)}


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


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
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
