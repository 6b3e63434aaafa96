"""Converted checkpoints: parameters as a model has them, in Orbax's format, beside config.json and the tokenizer.

    config.json                        with `quantization_config`, if they are quantized
    tokenizer.json, ...                as they were
    weights/                           one array a parameter, written by Orbax (OCDBT, not compressed)
    jaxinfer.json                      the manifest, written last: a folder without it is none

Reading one is a matter of copying: nothing is transposed, taken apart or quantized, and each device reads its own part.
Orbax is imported when it is needed: it takes half a second.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
from fsspec.implementations.local import LocalFileSystem
from jax.sharding import Mesh

from jaxinfer.checkpoint.files import read_json, short, some
from jaxinfer.checkpoint.safetensors import DTYPES
from jaxinfer.checkpoint.write import Layout
from jaxinfer.errors import CheckpointError
from jaxinfer.models.model import AbstractModel, Params
from jaxinfer.places import file_system, inside, reached
from jaxinfer.quantization.schemes import SCALE, Quantization
from jaxinfer.quantization.stored import converted_quantization_config
from jaxinfer.sharding import PADDED

MANIFEST, WEIGHTS = "jaxinfer.json", "weights"
FORMAT = 1
KINDS = {str(dtype): dtype for dtype in DTYPES.values()}  # of the arrays that there may be
CHUNK = 2**24  # bytes: another mesh reads whole ones, so they are smaller than a device's part of a large weight


class Converted:
    """A converted checkpoint, of which the manifest has been read.

    url: where the weights are if only the other files are in the folder; a manifest does not say where.
    folder: with the manifest.
    weights: where Orbax's files are.
    files: their sizes, by name.
    tensors: name -> shape, with the padding of the mesh that wrote it, and dtype.
    nbytes: of all tensors.

    Raises ValueError for a manifest that is none, and for weights that are a link to somewhere else.
    """

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.folder = folder
        path = folder / MANIFEST
        manifest = read_json(path)
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{path}: format is {short(manifest.get('format'))}, and {FORMAT} is read: convert the checkpoint again"
            )
        if "weights" in manifest:
            raise ValueError(
                f"{path}: says that weights are {short(manifest['weights'])}; they are in {WEIGHTS}/ beside it and "
                "nowhere else: remove the field"
            )
        self.weights = f"{url}/{WEIGHTS}" if url else str(inside(os.path.abspath(folder), WEIGHTS, f"{path}: weights"))
        try:
            self.files = dict(zip(manifest["files"], _sizes_of([*manifest["files"].values()]), strict=True))
            self.tensors = {
                name: _layout(entry["shape"], entry["dtype"]) for name, entry in manifest["tensors"].items()
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not what jaxinfer convert writes ({error!r:.200}): convert it again") from None
        self.nbytes = sum(stored.nbytes for stored in self.tensors.values())

    def check(self, quantization: Quantization | None) -> None:
        """Raises ValueError if it is to be quantized: what is there is only restored."""
        if quantization is not None and not any(name.endswith(SCALE) for name in self.tensors):
            raise ValueError(
                f"quantization is {quantization!r}: {self.folder} was converted without; leave it out, or convert the "
                "original checkpoint again"
            )

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sizes_of(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list):
        raise TypeError(f"{short(sizes)} is no list of sizes")
    if wrong := [size for size in sizes if type(size) is not int or not 0 <= size < 2**63]:
        raise ValueError(f"{short(wrong[0])} is no size")
    return tuple(sizes)


def _layout(shape: Any, dtype: Any) -> Layout:
    layout = Layout(_sizes_of(shape), KINDS[dtype])
    if layout.nbytes >= 2**63:
        raise ValueError(f"{short(shape)} is no shape")
    return layout


def is_converted(folder: Path) -> bool:
    """Whether a folder has a manifest."""
    return os.path.lexists(folder / MANIFEST)


def converted_config(model: AbstractModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json: what was quantized before stays said as it was, what is now is said in our way."""
    return {
        **config,
        **(
            {}
            if any(spec.stored for spec in model.params.values())
            else converted_quantization_config(model.quantization)
        ),
    }


def manifest(params: Mapping[str, jax.Array], weights: str) -> bytes:
    """The content of the manifest of these parameters, which were written to `weights`."""
    tensors = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in params.items()}
    return json.dumps({"format": FORMAT, "files": _sizes(weights), "tensors": tensors}, indent=1).encode()


def save(params: Params, path: str) -> None:
    """Writes the parameters into the folder or gs:// URL `path`, which must not be there: each process those parts
    that it holds. Raises OSError."""
    import orbax.checkpoint as ocp

    arguments = {name: ocp.SaveArgs(chunk_byte_size=CHUNK) for name in params}
    with _checkpointer(params) as checkpointer:
        try:
            checkpointer.save(_url(path), args=ocp.args.PyTreeSave(params, save_args=arguments))
        except ValueError as error:  # tensorstore's, for a full disk too
            raise OSError(f"{path}: can't be written: {short(str(error))}") from None


def restore(model: AbstractModel, checkpoint: Converted, placement: jax.Device | Mesh) -> Params:
    """All parameters of `model`, in its dtype, on the device or split over the mesh, whatever mesh they were written
    from. Each process reads what its devices hold. Host memory beside the result: four of the largest tensors, or 1 GB.

    Raises ValueError for files that are damaged, or that are not of this model.
    """
    import orbax.checkpoint as ocp

    _check(model, checkpoint)
    # Orbax would notice most of it, but in the middle of reading, and with complaints that last after its error.
    with reached(checkpoint.weights):
        sizes = _sizes(checkpoint.weights)
    wrong = [name for name, size in checkpoint.files.items() if sizes.get(name) != size]
    if wrong:
        raise _damaged(checkpoint.weights, f"files that are missing or have another size: {some(wrong)}")
    wanted = {name: model.with_sharding(name, placement) for name in model.abstract}
    arguments = {
        # Not strict: padding is cut off, and added.
        name: ocp.ArrayRestoreArgs(sharding=array.sharding, global_shape=array.shape, dtype=array.dtype, strict=False)
        for name, array in wanted.items()
    }
    with _checkpointer(wanted) as checkpointer:
        try:
            return dict(checkpointer.restore(_url(checkpoint.weights), args=ocp.args.PyTreeRestore(wanted, arguments)))
        except Exception as error:  # Orbax raises just that
            raise _damaged(checkpoint.weights, short(str(error))) from None


def _damaged(path: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or cut off: {problem}; convert the checkpoint again")


def _sizes(path: str) -> dict[str, int]:
    """The files below a folder or URL, and their bytes. Raises ValueError for links that lead out of it."""
    fs, root = file_system(path)
    infos = fs.find(root, detail=True)
    sizes = {name.removeprefix(root).lstrip("/"): int(info["size"]) for name, info in infos.items()}
    if isinstance(fs, LocalFileSystem):
        for name in sizes:
            inside(root, name, f"{path}: file")
    return sizes


def _check(model: AbstractModel, checkpoint: Converted) -> None:
    """Whether the tensors are the model's, but for padding."""
    stored = checkpoint.tensors
    both = [name for name in model.abstract if name in stored]
    problems = [
        f"{what}: {some(names)}"
        for what, names in (
            ("missing tensors", [name for name in model.abstract if name not in stored]),
            ("unknown tensors", [name for name in stored if name not in model.abstract]),
            ("wrong shapes", [name for name in both if not _fits(model, name, stored[name])]),
            ("wrong dtypes", [n for n in both if n in model.quantized and stored[n].dtype != model.abstract[n].dtype]),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{checkpoint.folder}: does not fit its config.json: {'; '.join(problems)}")


def _fits(model: AbstractModel, name: str, stored: Layout) -> bool:
    shape, axes = model.abstract[name].shape, model.axes[name]
    return len(shape) == len(stored.shape) and all(
        there == size or (axis in PADDED and there > size)
        for there, size, axis in zip(stored.shape, shape, axes, strict=True)
    )


@contextlib.contextmanager
def _checkpointer(tensors: Mapping[str, Any]) -> Iterator[Any]:
    """Orbax's, which has few tensors at a time in memory, and says nothing."""
    import orbax.checkpoint as ocp

    largest = max((tensor.size * tensor.dtype.itemsize for tensor in tensors.values()), default=0)
    limit = 1 + 4 * largest // 10**9
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        handler = ocp.PyTreeCheckpointHandler(
            use_compression=False, save_concurrent_gb=limit, restore_concurrent_gb=limit
        )
        with ocp.Checkpointer(handler) as checkpointer:
            yield checkpointer
    finally:
        log.setLevel(level)


def _url(path: str) -> Any:
    from etils import epath

    return epath.Path(path if "://" in path else os.path.abspath(path))
