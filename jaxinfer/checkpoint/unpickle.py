"""The values of a pickle of torch.save, without pickle: nothing is imported, called or built but what is written here.

Formats: Python's pickletools, whose readers of arguments are used; `torch/serialization.py`, whose persistent ids are
storages.

An opcode that is not on the closed list below, or a name that is not in `rebuild`, is refused before anything is made
of it. Each opcode makes at most one small object, so memory and time are bounded by their number and by the bytes.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from typing import Any

from jaxinfer.checkpoint.files import short
from jaxinfer.checkpoint.rebuild import CALLS, NAMES, STORAGES, Name, Ordered, Storage, add_items, called, what

MAX_OPCODES = 2_000_000  # some 30 a tensor; with what they make, at most a few hundred MB
MAX_BYTES = 2**25  # of a file's pickles
_MAX_LINE = 256  # bytes of a name


class Window(io.BufferedReader):
    """At most `size` bytes of an open file, from `start` on. What asks for more gets a ValueError, and no memory."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        super().__init__(io.FileIO(descriptor, closefd=False))
        self.seek(start)
        self.left = size

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return self.read(min(self.left, 2**17))
        if size > self.left:
            raise ValueError(f"{size} more bytes are asked for, and {self.left} are left (limit in all: {MAX_BYTES})")
        self.left -= size
        return super().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(min(self.left, _MAX_LINE))
        self.left -= len(line)
        return line


class Unpickler:
    """Reads one value after the other.

    storages: key -> Storage of all that have been met.

    Raises ValueError (one line, without the file's name).
    """

    def __init__(self, file: Window) -> None:
        self._file = file
        self.storages: dict[str, Storage] = {}
        self._count = 0

    def load(self) -> Any:
        """The next value. Tensors are Views, and what else there is has Python's own types, or is a Name or Storage."""
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        read, stack, marks = self._file.read, self._stack, self._marks
        while True:
            code = read(1)
            self._count += 1
            if self._count > MAX_OPCODES:
                raise ValueError(f"more than {MAX_OPCODES} opcodes, which no file of tensors has")
            if code not in _OPCODES:
                raise ValueError(_refused(code))
            act, argument, wanted = _OPCODES[code]
            # What is before the last mark is not for opcodes that take from the stack.
            if len(stack) - (marks[-1] if marks else 0) < wanted:
                raise ValueError(f"opcode {_named(code)} finds too little on the stack")
            if act is None:  # STOP
                if len(stack) != 1 or marks:
                    raise ValueError("the pickle ends with more than one value")
                return stack.pop()
            act(self, argument(self._file)) if argument else act(self)

    # Opcodes ------------------------------------------------------------------------------------------------------

    def protocol(self, number: int) -> None:
        if not 2 <= number <= 5:
            raise ValueError(f"pickle protocol {number}; torch.save writes 2, and can write 3 to 5")

    def skip(self, _: int) -> None:
        """The length of a frame, which is for readers that read ahead."""

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def push_long(self, value: int) -> None:
        if value.bit_length() > 128:
            raise ValueError(f"an integer of {value.bit_length()} bits")
        self.push(value)

    def push_latin(self, text: str) -> None:
        self.push(text.encode("latin-1").decode())  # Python 2's texts, in which bytes are UTF-8

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def memoize(self) -> None:
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"nothing is remembered as {index}")
        self.push(self._memo[index])

    def tuple_of(self, count: int) -> None:
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def tuple_since_mark(self) -> None:
        self.push(tuple(self._since_mark()))

    def append(self) -> None:
        self._extend([self._stack.pop()])

    def appends(self) -> None:
        self._extend(self._since_mark())

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def set_items(self) -> None:
        self._update(self._since_mark())

    def global_(self, names: tuple[str, str]) -> None:
        self._push_name(*names)

    def stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no text")
        self._push_name(module, name)

    def persistent(self) -> None:
        match self._stack.pop():
            # The older form says of which part of a storage it is, None: since torch 0.4 they have no parts.
            case ("storage", Name(text=kind), str(key), str(), int(count), *part) if part in ([], [None]):
                dtype = STORAGES.get(kind.rpartition(".")[2])
            case ("module", *_):
                raise ValueError("a module with its source, and only tensors are read: save its state_dict() instead")
            case _:
                raise ValueError("a persistent id that is no storage")
        if dtype is None or not 0 <= count < 2**62 or type(count) is not int:
            raise ValueError(f"a storage of {short(count)} {short(kind)}")
        storage = Storage(key, dtype, count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {short(key)} is there twice, with other types or sizes")
        self.push(storage)

    def reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Name or function.text not in CALLS or type(arguments) is not tuple:
            raise ValueError(f"a call of {what(function)}, and only those that make tensors are known")
        # The items of arguments count as well: a long list can be remembered, and be an argument often.
        self._count += sum(len(argument) for argument in arguments if type(argument) is list)
        self.push(called(function.text, arguments))

    def build(self) -> None:
        state, value = self._stack.pop(), self._stack[-1]
        if type(value) is not Ordered or type(state) is not dict:
            raise ValueError(f"opcode BUILD sets attributes of {what(value)}, and only an OrderedDict has some")

    # What they have in common -------------------------------------------------------------------------------------

    def _since_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("an opcode without its MARK")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _top(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("items without the list or dictionary that they are for")
        return self._stack[-1]

    def _extend(self, items: list[Any]) -> None:
        if type(self._top()) is not list:
            raise ValueError(f"items are appended to {what(self._stack[-1])}")
        self._stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) not in (dict, Ordered):
            raise ValueError(f"items are set in {what(target)}")
        if len(items) % 2:
            raise ValueError("a key without a value")
        add_items(target, zip(items[::2], items[1::2], strict=True))

    def _push_name(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in NAMES:
            raise ValueError(
                f"it asks for {short(full)}, and nothing that a pickle names is imported or called: "
                "tensors, OrderedDict and plain values are read"
            )
        self.push(NAMES[full])


# The closed list of opcodes -----------------------------------------------------------------------------------------

Act = Callable[..., None]


def _opcodes(**acts: tuple[Act | None, int]) -> dict[bytes, tuple[Act | None, Callable[[Any], Any] | None, int]]:
    """By its code what an opcode does, the reader of its argument, and how many values it wants."""
    by_name = {op.name: op for op in pickletools.opcodes}
    result = {}
    for name, (act, wanted) in acts.items():
        argument = by_name[name].arg
        reader = _two_lines if name == "GLOBAL" else argument.reader if argument else None
        result[by_name[name].code.encode("latin-1")] = (act, reader, wanted)
    return result


def _two_lines(file: Window) -> tuple[str, str]:
    """pickletools' own reader decodes escapes, with warnings."""
    lines = file.readline(), file.readline()
    if not all(line.endswith(b"\n") for line in lines):
        raise ValueError("a name without an end")
    module, name = (line[:-1].decode("ascii") for line in lines)
    return module, name


def _pushes(value: Any) -> Act:
    return lambda machine: machine.push(value)


_OPCODES = _opcodes(
    PROTO=(Unpickler.protocol, 0),
    FRAME=(Unpickler.skip, 0),
    STOP=(None, 1),
    MARK=(Unpickler.mark, 0),
    NONE=(_pushes(None), 0),
    NEWTRUE=(_pushes(True), 0),
    NEWFALSE=(_pushes(False), 0),
    BININT=(Unpickler.push, 0),
    BININT1=(Unpickler.push, 0),
    BININT2=(Unpickler.push, 0),
    LONG1=(Unpickler.push_long, 0),
    BINFLOAT=(Unpickler.push, 0),
    SHORT_BINSTRING=(Unpickler.push_latin, 0),
    BINSTRING=(Unpickler.push_latin, 0),
    BINUNICODE=(Unpickler.push, 0),
    SHORT_BINUNICODE=(Unpickler.push, 0),
    BINUNICODE8=(Unpickler.push, 0),
    EMPTY_TUPLE=(_pushes(()), 0),
    TUPLE1=(lambda machine: machine.tuple_of(1), 1),
    TUPLE2=(lambda machine: machine.tuple_of(2), 2),
    TUPLE3=(lambda machine: machine.tuple_of(3), 3),
    TUPLE=(Unpickler.tuple_since_mark, 0),
    EMPTY_LIST=(lambda machine: machine.push([]), 0),
    APPEND=(Unpickler.append, 2),
    APPENDS=(Unpickler.appends, 0),
    EMPTY_DICT=(lambda machine: machine.push({}), 0),
    SETITEM=(Unpickler.set_item, 3),
    SETITEMS=(Unpickler.set_items, 0),
    BINPUT=(Unpickler.put, 1),
    LONG_BINPUT=(Unpickler.put, 1),
    MEMOIZE=(Unpickler.memoize, 1),
    BINGET=(Unpickler.get, 0),
    LONG_BINGET=(Unpickler.get, 0),
    GLOBAL=(Unpickler.global_, 0),
    STACK_GLOBAL=(Unpickler.stack_global, 2),
    BINPERSID=(Unpickler.persistent, 1),
    REDUCE=(Unpickler.reduce, 2),
    BUILD=(Unpickler.build, 2),
)
_NAMED = {op.code.encode("latin-1"): op.name for op in pickletools.opcodes}


def _named(code: bytes) -> str:
    return _NAMED.get(code, code.hex() or "none")


def _refused(code: bytes) -> str:
    if code in _NAMED:
        return f"pickle opcode {_NAMED[code]}, and files of tensors have none: it makes what is not read"
    return f"byte 0x{code.hex()} is no pickle opcode" if code else "the pickle has no end"
