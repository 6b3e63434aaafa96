"""Hostile pickles in files of torch.save: an error of one line; nothing is imported, and memory and time are bounded.
The tricks are those that are published of pickle, and of scanners that were passed. What is hostile around the pickle
is in test_pickled_archives.py."""

import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from jaxinfer.checkpoint import unpickle
from tests.checkpoint.torch_files import (
    GOOD,
    STORAGE,
    both,
    dictionary,
    legacy,
    literal,
    name,
    number,
    opened,
    refusal,
    storage,
    tensor,
    text,
    watched,
    write,
    zipped,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.bin"


def test_the_good_one(path: Path) -> None:
    """The attacks below are changes of it."""
    for form in (zipped, legacy):
        write(path, form(GOOD, {"0": STORAGE}))
        assert opened(path) == literal(path.read_bytes()) == {"a": ("float32", (3, 4), STORAGE)}


def test_the_watch_hears() -> None:
    with watched() as events:
        pickle.loads(b"cos\ngetpid\n)R.")
        import json.tool  # noqa: F401
    assert any(event.startswith("pickle.find_class ('os', 'getpid')") for event in events)
    assert any(event.startswith("import json.tool") for event in events)


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


def test_strides_of_axes_that_have_one_index_are_any(path: Path) -> None:
    for shape, strides in (((1, 12), (2**62, 1)), ((12, 1), (1, 2**63 - 1)), ((1, 1), (0, 7))):
        write(path, zipped(dictionary(a=tensor(0, shape, strides)), {"0": STORAGE}))
        assert opened(path) == {"a": ("float32", shape, STORAGE[: 4 * shape[0] * shape[1]])}


def test_elements_that_overlap_are_read_together(path: Path) -> None:
    """One read for each of them would take minutes."""
    shape, strides = (2**11, 2**11), (17, 16)
    content = zipped(dictionary(a=tensor(0, shape, strides, storage(33 * 2**11))), {"0": bytes(4 * 33 * 2**11)})
    path.write_bytes(content)
    start = time.process_time()
    assert opened(path) == {"a": ("float32", shape, bytes(2**24))}
    assert time.process_time() - start < 1


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
