"""Files of torch.save (`.bin`, `.pt`, `.pth`, `.ckpt`), read as strictly as safetensors files and without pickle.

Format: `torch/serialization.py`. Since torch 1.6 a zip archive, nothing in it compressed, with records in one folder:
`data.pkl`, a pickle whose tensors are views of storages, `data/KEY` for each storage, and `byteorder`. Before that, and
with `_use_new_zipfile_serialization=False`, five pickles one after the other (a magic number, a version, facts about
the machine, the value, the keys of storages) and each storage with its length before it.

The value is a dictionary of tensors; or one that has it as `state_dict`, `model_state_dict`, `model` or `module` among
what training needs, which is left out.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

from jaxinfer.checkpoint.files import short, some
from jaxinfer.checkpoint.rebuild import Ordered, Storage, View, what
from jaxinfer.checkpoint.tensors import TensorFile, TensorInfo
from jaxinfer.checkpoint.unpickle import MAX_BYTES, Unpickler, Window
from jaxinfer.errors import CheckpointError

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the older form
NESTED = ("state_dict", "model_state_dict", "model", "module")  # Lightning's and others'
MAX_REPEATED = 2**26  # bytes that a tensor may have beyond the file's, by axes of stride 0
_LOCAL = struct.Struct("<4s5H3I2H")  # a record's own header: APPNOTE.TXT, 4.3.7
_END = 22  # bytes of the archive's last header, without a comment: 4.3.16
_DESCRIPTOR = 24  # bytes after a record, at most
# Names with a dot are what torch notes about the archive itself.
_RECORDS = re.compile(r"data\.pkl|data/[^/]+|byteorder|version|\.\w+(/\w+)?")
_ENCRYPTED = 0x1 | 0x40 | 0x2000

Places = dict[str, tuple[int, int]]  # where bytes begin, and how many there are


class PickledFile(TensorFile):
    """An open file of torch.save, all of whose opcodes, records and storages have been checked.

    Tensors may share bytes. Attributes of tensors and modules, and whether they want gradients, are left out.
    """

    FORMAT = "torch.save"

    def _parse(self, size: int) -> Iterable[TensorInfo]:
        head = bytearray(min(size, 4))
        self._fill(memoryview(head), 0)
        try:
            value, storages = self._zipped(size) if head == b"PK\3\4" else self._legacy(size)
            views = _state_dict(value)
            for name, view in views.items():
                if view.nbytes > max(size, MAX_REPEATED):
                    raise ValueError(f"tensor {short(name)} repeats its values to {view.nbytes} bytes")
            return [self._info(name, view, storages[view.storage.key]) for name, view in views.items()]
        except CheckpointError:
            raise
        except ValueError as error:
            raise self._refused(str(error)) from None

    def _refused(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: not a plain file of tensors: {problem}; download it again, or, where you trust its "
            "writer, load it with torch and save its state_dict() alone, best as safetensors"
        )

    def _info(self, name: str, view: View, start: int) -> TensorInfo:
        unit = view.dtype.itemsize
        # Those of axes that have one index are any numbers.
        strides = tuple(stride * unit * (count > 1) for stride, count in zip(view.strides, view.shape, strict=True))
        return TensorInfo(name, view.dtype, view.shape, self.path, start + view.offset * unit, strides)

    def _zipped(self, size: int) -> tuple[Any, dict[str, int]]:
        """The value, and where its storages begin."""
        records = self._records(size)
        if "data.pkl" not in records:
            raise ValueError("an archive without data.pkl, so not of torch.save")
        stored = {name.removeprefix("data/"): place for name, place in records.items() if name.startswith("data/")}
        others = [name for name in records if not _RECORDS.fullmatch(name)]
        if others:
            raise ValueError(f"records that torch.save does not write: {some(others)}")
        if "byteorder" in records:
            self._check_order(records["byteorder"])
        start, length = records["data.pkl"]
        if length > MAX_BYTES:
            raise ValueError(f"data.pkl has {length} bytes (limit: {MAX_BYTES})")
        with Window(self._file.fileno(), start, length) as file:
            unpickler = Unpickler(file)
            value = unpickler.load()
            if file.left:
                raise ValueError(f"{file.left} bytes after the end of the pickle in data.pkl")
        _check_storages(unpickler.storages, stored)
        for key, storage in unpickler.storages.items():
            if not storage.nbytes <= stored[key][1] < storage.nbytes + storage.dtype.itemsize:
                raise ValueError(f"storage {short(key)} has {stored[key][1]} bytes, and should have {storage.nbytes}")
        return value, {key: start for key, (start, _) in stored.items()}

    def _check_order(self, place: tuple[int, int]) -> None:
        order = bytearray(min(place[1], 16))
        self._fill(memoryview(order), place[0])
        if order != b"little":
            raise ValueError(f"byte order {short(order.decode('latin-1'))}, and only little-endian numbers are read")

    def _records(self, size: int) -> Places:
        """The archive's records by their names within its one folder. They and their headers cover it exactly."""
        try:
            with (
                Window(self._file.fileno(), 0, MAX_BYTES) as file,
                zipfile.ZipFile(file, metadata_encoding="utf-8") as z,
            ):
                entries, directory = z.infolist(), z.start_dir
        except (zipfile.BadZipFile, NotImplementedError, struct.error, EOFError, OverflowError) as error:
            raise ValueError(f"not a whole zip archive: {error}") from None
        if any(entry.orig_filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError("a TorchScript archive (torch.jit.save), which is a program")
        tail = bytearray(_END)
        self._fill(memoryview(tail), size - _END)
        if not tail.startswith(b"PK\5\6"):
            raise ValueError("a zip archive with a comment, or with something after it")
        places: Places = {}
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            name = entry.orig_filename
            folder, _, record = name.partition("/")
            if entry.compress_type or entry.compress_size != entry.file_size or entry.flag_bits & _ENCRYPTED:
                raise ValueError(f"record {short(name)} is compressed or encrypted, and torch.save writes plain ones")
            if record in places or not record or folder != entries[0].orig_filename.partition("/")[0]:
                raise ValueError(f"record {short(name)} is there twice, or not in the folder of the others")
            # A first record at 0, and no room between two but for a descriptor: no other archive hides in this one.
            if not end <= entry.header_offset <= (end + _DESCRIPTOR if places else 0):
                raise ValueError(
                    f"record {short(name)} begins at byte {entry.header_offset}, the one before ends at {end}"
                )
            start = self._data_start(entry, directory)
            end = start + entry.file_size
            if end > directory:
                raise ValueError(f"record {short(name)} ends at byte {end}, the archive's records at {directory}")
            places[record] = start, entry.file_size
        if not end <= directory <= end + _DESCRIPTOR:
            raise ValueError(f"the records end at byte {end}, and their directory begins at {directory}")
        return places

    def _data_start(self, entry: zipfile.ZipInfo, directory: int) -> int:
        name = entry.orig_filename.encode()
        header = bytearray(_LOCAL.size + len(name))
        if entry.header_offset + len(header) > directory:
            raise ValueError(f"record {short(entry.orig_filename)} begins within the archive's directory")
        self._fill(memoryview(header), entry.header_offset)
        magic, _, flags, method, *_, name_length, extra = _LOCAL.unpack_from(header)
        if (
            (magic, method, name_length) != (b"PK\3\4", 0, len(name))
            or flags & _ENCRYPTED
            or header[-len(name) :] != name
        ):
            raise ValueError(
                f"record {short(entry.orig_filename)} has another header than the archive's directory says"
            )
        return entry.header_offset + len(header) + int(extra)

    def _legacy(self, size: int) -> tuple[Any, dict[str, int]]:
        with Window(self._file.fileno(), 0, min(size, MAX_BYTES)) as file:
            unpickler = Unpickler(file)
            try:
                known = unpickler.load() == MAGIC
            except ValueError:
                known = False
            if not known:
                raise ValueError("neither a zip archive nor the older form of torch.save")
            version, machine, value, keys = (unpickler.load() for _ in range(4))
            place = file.tell()
        if type(version) is not int or version != VERSION:
            raise ValueError(f"a version that is not {VERSION}")
        if type(machine) is not dict or machine.get("little_endian") is not True:
            raise ValueError("numbers that are not said to be little-endian")
        if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
            raise ValueError("keys of storages that are no list of names")
        _check_storages(unpickler.storages, keys)
        starts = {}
        for key in keys:
            storage = unpickler.storages[key]
            if place + 8 + storage.nbytes > size:
                raise ValueError(f"storage {short(key)} ends at byte {place + 8 + storage.nbytes}, the file at {size}")
            length = bytearray(8)
            self._fill(memoryview(length), place)
            if int.from_bytes(length, "little") != storage.count:
                raise ValueError(f"storage {short(key)} has another length than its tensors say")
            starts[key] = place + 8
            place += 8 + storage.nbytes
        if place != size:
            raise ValueError(f"the storages end at byte {place}, the file at {size}")
        return value, starts


def _check_storages(wanted: Mapping[str, Storage], there: Iterable[str]) -> None:
    there = set(there)
    if wanted.keys() != there:
        raise ValueError(
            f"storages that are missing: {some(wanted.keys() - there) or 'none'}; that no tensor is in: "
            f"{some(there - wanted.keys()) or 'none'}"
        )


def _state_dict(value: Any) -> dict[str, View]:
    if type(value) not in (dict, Ordered):
        raise ValueError(f"{what(value)} instead of a dictionary of tensors")
    nested = [name for name in NESTED if type(value.get(name)) in (dict, Ordered)]
    if len(nested) > 1:
        raise ValueError(f"several dictionaries that may be the model's: {', '.join(nested)}")
    if nested:
        value = value[nested[0]]
    for name, item in value.items():
        if type(name) is not str or type(item) is not View:
            raise ValueError(f"{short(name)} is {what(item)}, and should be the name of a tensor")
        name.encode()  # a lone surrogate is no text: UnicodeEncodeError is a ValueError
    return dict(value)
