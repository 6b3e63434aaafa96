"""Files of torch.save give the tensors that torch saved, from the bytes that were asked for alone, on the road of
safetensors files. What is hostile is in test_pickled_attacks.py."""

import itertools
import json
import os
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.batch.identity import model_fingerprint
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.pickled import PickledFile
from jaxinfer.convert import convert
from jaxinfer.models.model import AbstractModel
from tests.checkpoint.test_load import LLAMA, added_memory, tensors

torch = pytest.importorskip("torch")

FORMS = {
    **{f"zip-{protocol}": {"pickle_protocol": protocol} for protocol in (2, 3, 4, 5)},
    **{
        f"legacy-{protocol}": {"pickle_protocol": protocol, "_use_new_zipfile_serialization": False}
        for protocol in (2, 3, 4, 5)
    },
}
# torch itself can't read these back in the older form.
NEW = (
    "uint16",
    "uint32",
    "uint64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)
DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "bfloat16", "complex64"),
    *NEW,
)


def raw(tensor: Any) -> bytes:
    """The tensor's values in C order."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def same(array: np.ndarray, tensor: Any) -> None:
    assert array.shape == tuple(tensor.shape)
    assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
    assert array.tobytes() == raw(tensor)
    assert array.size == 0 or (array.flags.c_contiguous and array.ctypes.data % 64 == 0)


def read(path: Path) -> dict[str, np.ndarray]:
    with PickledFile(path) as file:
        return {name: file.read(info) for name, info in file.tensors.items()}


def everything() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    base, cube, row = random(6, 8), random(2, 3, 4, 5), torch.arange(40.0)
    made = {
        "whole": base,
        "transposed": base.t(),
        "sliced": base[1:4, 2:5],
        "steps": base[::2, ::3],
        "steps of the transposed": base.t()[2:5, ::2],
        "column": base[:, 3],
        "expanded": random(1, 4).expand(3, 4),
        "expanded within": random(3, 1, 2).expand(3, 5, 2),
        "scalar": torch.tensor(3.0),
        "one of many": base[2, 3],
        "empty": torch.empty(0, 4),
        "empty of a whole": base[3:3],
        "permuted": cube.permute(2, 0, 3, 1),
        "channels last": cube.to(memory_format=torch.channels_last),
        "ones": random(1, 3, 1).transpose(0, 2),
        "windows": row.as_strided((5, 6), (3, 1)),
        "windows of windows": row.as_strided((4, 5, 6), (10, 1, 1)),
        "far apart": row.as_strided((3, 2), (13, 9), 2),
        "windows with gaps": row.as_strided((12, 3), (1, 9)),
        "windows of steps": row.as_strided((5, 4), (2, 2)),
        "parameter": torch.nn.Parameter(random(2, 3)),
    }
    made["tied"] = made["parameter"]
    made["parameter with attributes"], made["buffer with attributes"] = torch.nn.Parameter(random(2, 2)), random(2)
    made["parameter with attributes"].is_expert = made["buffer with attributes"].is_expert = True
    for name in DTYPES:
        made[name] = torch.randint(0, 2, (3, 5), generator=generator).to(getattr(torch, name))
        made[f"{name} transposed"] = made[name].t()
    return made


@pytest.mark.parametrize("form", FORMS)
def test_what_torch_reads(tmp_path: Path, form: str) -> None:
    made, path = everything(), tmp_path / "a.bin"
    torch.save(OrderedDict(made), path, **FORMS[form])
    got = read(path)
    assert got.keys() == made.keys()
    for name, array in got.items():
        same(array, made[name])
    if form.startswith("legacy"):
        made = {name: tensor for name, tensor in made.items() if not name.startswith(NEW)}
        torch.save(made, path, **FORMS[form])
    again, got = torch.load(path, weights_only=False), read(path)
    assert got.keys() == again.keys()
    for name, array in got.items():
        same(array, again[name])


@pytest.mark.parametrize("form", ["zip-2", "legacy-2"])
def test_parts(tmp_path: Path, form: str) -> None:
    made, path = everything(), tmp_path / "a.bin"
    torch.save(made, path, **FORMS[form])
    choices = slice(None), slice(1, 3), slice(0, 1), slice(1, None, 2), slice(2, 2)
    with PickledFile(path) as file:
        for name, tensor in made.items():
            for index in itertools.product(*[choices] * min(tensor.dim(), 3)):
                part = file.read(file.tensors[name], index)
                assert part.shape == tuple(tensor[index].shape)
                assert part.tobytes() == raw(tensor[index]), (name, index)


@pytest.mark.parametrize(
    ("name", "index", "count"),
    [
        ("whole", (slice(1, 3),), 2 * 8),
        ("whole", (slice(None), slice(4, 8)), 6 * 4),
        ("transposed", (slice(4, 8),), 6 * 4),
        ("transposed", (slice(None), slice(1, 3)), 2 * 8),
        ("sliced", (), 3 * 3),
        ("column", (), 5 * 8 + 1),  # steps of eight, with what is between them
        ("far apart", (), 3 * 2),
        ("expanded", (), 4),
        ("permuted", (slice(1, 2),), 2 * 3 * 5),
    ],
)
def test_no_other_byte_is_read(tmp_path: Path, monkeypatch, name: str, index: tuple[slice, ...], count: int) -> None:
    made = everything()
    torch.save(made, tmp_path / "a.bin")
    counted, original = [], os.preadv

    def preadv(descriptor: int, buffers: list, offset: int) -> int:
        counted.append(original(descriptor, buffers, offset))
        return counted[-1]

    with PickledFile(tmp_path / "a.bin") as file:
        monkeypatch.setattr(os, "preadv", preadv)
        same(file.read(file.tensors[name], index), made[name][index])
    assert sum(counted) == 4 * count


def test_shared_storages_take_no_more(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    torch.save({"a": base[:500], "b": base[250:750].view(50, 10), "c": base, "d": base}, tmp_path / "a.bin")
    with PickledFile(tmp_path / "a.bin") as file:
        assert file.path.stat().st_size < 2 * base.nbytes
        offsets = {name: info.offset - file.tensors["a"].offset for name, info in file.tensors.items()}
        assert offsets == {"a": 0, "b": 1000, "c": 0, "d": 0}
        same(file.read(file.tensors["b"]), base[250:750].view(50, 10))


# What is in the dictionary --------------------------------------------------------------------------------------------

A = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model", "module"])
@pytest.mark.parametrize("form", ["zip-2", "legacy-2"])
def test_a_checkpoint_of_a_training(tmp_path: Path, name: str, form: str) -> None:
    """As Lightning and others write it, with an optimizer's state and a loss, of which nothing is wanted."""
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(A).sum().backward()
    optimizer.step()
    training = {"epoch": 3, "lr": 0.1, "note": None, "done": True, "optimizer_states": [optimizer.state_dict()]}
    training["loss"] = torch.tensor(0.5)
    torch.save({**training, name: module.state_dict()}, tmp_path / "last.ckpt", **FORMS[form])
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == {"weight", "bias"}
        same(checkpoint.read("weight"), module.weight)


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: A, "a tensor instead of a dictionary of tensors"),
    (lambda: [A], "a value of type list instead of"),
    (lambda: {"a": A, "epoch": 3}, "'epoch' is a value of type int"),
    (lambda: {"a": A, "inner": {"b": A}}, "'inner' is a value of type dict"),
    (lambda: {"weights": {"b": A}}, "'weights' is a value of type dict"),
    (lambda: {0: A}, "0 is a tensor, and should be the name of a tensor"),
    (lambda: {"model": {"a": A}, "module": {"a": A}}, "several dictionaries that may be the model's: model, module"),
    (lambda: {"a": A, "storage": A.clone().untyped_storage()}, "'storage' is a value of type Storage"),
    (lambda: {"a": A, "size": A.shape}, "'size' is a value of type tuple"),
    (lambda: {"a": A, "dtype": torch.float32}, "'dtype' is torch.float32"),
    (lambda: {"\ud800": A}, "surrogates not allowed"),
    (lambda: {"a": A.to_sparse()}, r"torch\._utils\._rebuild_sparse_tensor"),
    (lambda: {"a": torch.quantize_per_tensor(A, 0.1, 0, torch.qint8)}, r"torch\._utils\._rebuild_qtensor"),
    (lambda: {"a": A.to("meta")}, r"torch\._utils\._rebuild_meta_tensor_no_storage"),
    (lambda: {"a": A.to(torch.complex128)}, r"torch\.ComplexDoubleStorage"),
    (lambda: {"a": torch.zeros(2, dtype=torch.complex32)}, r"torch\.complex32"),
    (lambda: {"a": A.to(torch.complex64).conj()}, r"values are not as stored \('conj'\)"),
    (lambda: {"a": A, "set": {1}}, r"__builtin__\.set"),
    (lambda: {"a": A, "array": np.zeros(3)}, r"numpy\..*_reconstruct"),
    (lambda: {"a": A, "path": Path("x")}, "pathlib"),
    (lambda: {"a": A, "bytes": b"x" * 300}, r"_codecs\.encode"),
    (lambda: {"a": A, "device": torch.device("cpu")}, r"torch\.device"),
    (lambda: torch.nn.Linear(3, 2), r"torch\.nn\.modules\.linear\.Linear"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=[message for _, message in REFUSED])
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_dictionary_is_refused_by_name(tmp_path: Path, value, message: str) -> None:
    path = tmp_path / "a.bin"
    torch.save(value(), path)
    with pytest.raises(ValueError, match=message) as caught:
        PickledFile(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: not a plain file of tensors: ")
    assert text.endswith("load it with torch and save its state_dict() alone, best as safetensors")
    assert "\n" not in text


def test_a_module_of_old_and_a_big_machine(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.bin"
    torch.save(torch.nn.Linear(3, 2), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear"):
        PickledFile(path)
    monkeypatch.setattr(sys, "byteorder", "big")
    for form, message in (("zip-2", "byte order 'big'"), ("legacy-2", "not said to be little-endian")):
        torch.save({"a": A}, path, **FORMS[form])
        with pytest.raises(ValueError, match=message):
            PickledFile(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_of_torchscript(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 2), A), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a TorchScript archive"):
        PickledFile(tmp_path / "a.pt")


# In folders -----------------------------------------------------------------------------------------------------------


def test_several_files_with_an_index(tmp_path: Path) -> None:
    made = {"a": A, "b": A + 1, "c": A.t()}
    parts = {"pytorch_model-00001-of-00002.bin": ["a", "b"], "pytorch_model-00002-of-00002.bin": ["c"]}
    for file, names in parts.items():
        torch.save({name: made[name] for name in names}, tmp_path / file)
    index = {name: file for file, names in parts.items() for name in names}
    for again in (True, False):  # without the index it is a complete set all the same
        with Checkpoint(tmp_path) as checkpoint:
            for name, tensor in made.items():
                same(checkpoint.read(name), tensor)
                assert checkpoint.tensors[name].file.name == index[name]
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
        assert again or checkpoint.bytes_read == 3 * A.nbytes
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index | {"d": "../x.bin"}}))
    with pytest.raises(ValueError, match=r"pytorch_model.bin.index.json that are not \*.bin or .* itself: \.\./x.bin"):
        Checkpoint(tmp_path)


def test_which_file(tmp_path: Path) -> None:
    """safetensors before others; what a training leaves beside a model is none; an adapter is none."""
    torch.save({"other": A}, tmp_path / "training_args.bin")
    torch.save({"other": A}, tmp_path / "optimizer.pt")
    with pytest.raises(FileNotFoundError, match="no weights"):
        Checkpoint(tmp_path)
    torch.save({"other": A}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"only an adapter \(adapter_model.bin\)"):
        Checkpoint(tmp_path)
    torch.save({"first": A}, tmp_path / "any.pth")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == {"first"}
    torch.save({"second": A}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"several bin files \(any.pth, more.pt\) and no pytorch_model.bin.index.json"):
        Checkpoint(tmp_path)
    torch.save({"third": A}, tmp_path / "pytorch_model.bin")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == {"third"}
    from safetensors.torch import save_file

    save_file({"fourth": A}, tmp_path / "any.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == {"fourth"}


def test_another_file_is_another_model(tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "model.pt")
    before = model_fingerprint(tmp_path)
    torch.save({"a": A + 1}, tmp_path / "model.pt")
    assert model_fingerprint(tmp_path) != before


# To the devices -------------------------------------------------------------------------------------------------------


def save(folder: Path, made: dict[str, np.ndarray], form: str) -> None:
    kinds = {"bfloat16": (np.int16, torch.bfloat16)}

    def tensor(array: np.ndarray) -> Any:
        seen, kind = kinds.get(str(array.dtype), (array.dtype, None))
        made = torch.from_numpy(array.view(seen))
        return made if kind is None else made.view(kind)

    folder.mkdir(exist_ok=True)
    torch.save({name: tensor(array) for name, array in made.items()}, folder / "pytorch_model.bin", **FORMS[form])


@pytest.mark.parametrize("form", ["zip-2", "legacy-2"])
@pytest.mark.parametrize("mesh", [None, "tensor=2,fsdp=2"])
def test_a_part_of_the_mesh_reads_its_own_bytes(tmp_path: Path, form: str, mesh: str | None) -> None:
    from jaxinfer.sharding import make_mesh

    made = tensors(LLAMA)
    save(tmp_path, made, form)
    placement = jax.devices()[0] if mesh is None else make_mesh(mesh, jax.devices(), 4, 2, 16)
    model = AbstractModel.from_config(LLAMA, "float32")
    with Checkpoint(tmp_path) as checkpoint:
        params = load_params(model, checkpoint, placement)
        assert checkpoint.bytes_read == checkpoint.nbytes == sum(array.nbytes for array in made.values())
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(np.asarray(params[name])[:16, :24], made[name])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["zip-2", pytest.param("legacy-2", marks=pytest.mark.slow)])
def test_peak_memory_is_the_result_and_about_one_tensor(tmp_path: Path, form: str) -> None:
    config = LLAMA | {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 2000, "num_hidden_layers": 4}
    made = tensors(config, ml_dtypes.bfloat16)
    save(tmp_path, made, form)
    result = sum(array.nbytes for array in made.values()) * 2 / 2**20
    largest = max(array.nbytes for array in made.values()) / 2**20
    assert 0.9 * result < added_memory(tmp_path, config, "float32") < result + 2 * largest + 4 + 2 * (1 + result // 64)


OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 8}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def pickled_gpt2(checkpoints, tmp_path: Path) -> Path:
    """As transformers 2 to 4 wrote it: a tied head, and causal masks."""
    from safetensors.torch import load_file

    folder = shutil.copytree(checkpoints("gpt2-old").folder, tmp_path / "gpt2")
    made = load_file(folder / "model.safetensors")
    made["lm_head.weight"] = made["wte.weight"]
    torch.save(made, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_gpt2_generates_as_from_safetensors(checkpoints, pickled_gpt2: Path) -> None:
    texts = []
    for folder in (checkpoints("gpt2-old").folder, pickled_gpt2):
        with LLM(folder, **OPTIONS) as llm:
            texts.append([output.outputs[0].token_ids for output in llm.generate(["a b c", "hello"], GREEDY)])
    assert texts[0] == texts[1]


def test_converted_to_safetensors(pickled_gpt2: Path, tmp_path: Path) -> None:
    convert(pickled_gpt2, tmp_path / "new", format="hf", show_progress=False)
    assert not list((tmp_path / "new").glob("*.bin"))
    with Checkpoint(pickled_gpt2) as old, Checkpoint(tmp_path / "new") as new:
        names = {re.sub(r"^transformer\.", "", name): name for name in new.tensors}
        assert {"wte.weight", "ln_f.bias"} < names.keys() <= old.tensors.keys()
        for name, spelled in names.items():
            np.testing.assert_array_equal(new.read(spelled), old.read(name))
