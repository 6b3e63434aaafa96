"""What architectures declare comes back as it was kept; what is not as it should be is made anew."""

import dataclasses
import json
import logging

import jax
import pytest
import transformers
from jax.sharding import AbstractMesh

from jaxinfer.models import model as models
from jaxinfer.models import registry
from jaxinfer.models.declared import TYPES, Declarations, encode
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.tasks import CLASSIFY, with_task
from jaxinfer.private_folder import PrivateFolder
from tests.models.families import CLASSES, encoders, variants

ONE_OF_EACH = {variant.config: variant for variant in reversed(variants().values())}
CLASSIFIERS = {variant.config: variant for variant in encoders().values() if variant.auto == CLASSES}


def config_of(name, of=ONE_OF_EACH):
    return json.loads(getattr(transformers, name)(**of[name].fields).to_json_string(use_diff=False))


def classifier_of(name):
    data = config_of(name, CLASSIFIERS) | {"architectures": [name.replace("Config", "ForSequenceClassification")]}
    return with_task(data, CLASSIFY)


@pytest.fixture
def declarations(tmp_path):
    return Declarations(PrivateFolder(tmp_path / "declarations"), "code")


def no_module(*_):
    raise AssertionError("a module is built")


@pytest.mark.parametrize(
    "data",
    [
        *(pytest.param(lambda name=name: config_of(name), id=name) for name in ONE_OF_EACH),
        *(pytest.param(lambda name=name: classifier_of(name), id=f"{name}-classes") for name in CLASSIFIERS),
    ],
)
def test_every_family_s_come_back(data, declarations, monkeypatch):
    data = data()
    first = AbstractModel.from_config(data, "bfloat16", "int8", "float32", declarations=declarations)
    monkeypatch.setattr(models, "_build", no_module)
    monkeypatch.setattr(registry, "parse_config", no_module)
    second = AbstractModel.from_config(data, "bfloat16", "int8", "float32", declarations=declarations)
    assert dataclasses.replace(second, _module=first._module) == first
    assert (second.head, second.abstract) == (first.head, first.abstract)
    with pytest.raises(AssertionError, match="a module is built"):
        second.bind(second.abstract)
    with pytest.raises(AssertionError, match="a module is built"):  # of another dtype
        AbstractModel.from_config(data, "float32", None, "float32", declarations=declarations)


def test_a_module_is_first_built_where_a_program_for_a_mesh_is_traced(declarations):
    data = config_of("MixtralConfig")
    AbstractModel.from_config(data, "float32", declarations=declarations)
    later = AbstractModel.from_config(data, "float32", declarations=declarations)

    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("tensor",))):
        assert jax.eval_shape(lambda params: (later.bind(params), params)[1], later.abstract) == later.abstract


def files(declarations):
    return sorted(declarations._folder.path.iterdir())


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 100000, b"{}", b'{"Tensor": {}}', b'{"Tensor": {"name": "a"}}', b'{"Popen": {"args": "ls"}}', b"\xff"],
)
def test_others_are_made_anew(declarations, content, caplog):
    data = config_of("LlamaConfig")
    first = declarations.config(data)
    (file,) = files(declarations)
    declarations._folder.write(file.name, content)
    with caplog.at_level(logging.WARNING):
        assert declarations.config(data) == first
    assert f"{file}: " in caplog.text
    assert "it is made anew" in caplog.text
    caplog.clear()
    assert declarations.config(data) == first
    assert not caplog.text


def test_other_code_and_other_families(declarations, monkeypatch):
    data = config_of("LlamaConfig")
    declarations.config(data)
    Declarations(declarations._folder, "other").config(data)
    assert len(files(declarations)) == 2
    monkeypatch.setitem(registry.REGISTRY, "Mine", registry.Entry("mine", "some.module", ""))
    declarations.config(data)
    assert len(files(declarations)) == 3


def test_a_family_from_outside_is_not_kept(declarations, monkeypatch):
    data = config_of("LlamaConfig")
    theirs = dataclasses.replace(registry.architecture(data), build=no_module)
    monkeypatch.setitem(registry.REGISTRY, "LlamaForCausalLM", registry.Entry("llama", theirs, ""))
    assert not declarations.config(data).built_in
    assert not files(declarations)


def test_only_what_is_declared_is_kept():
    for value in (object(), {"a": 1}, [1], LookupError):
        with pytest.raises((TypeError, AssertionError, KeyError)):
            encode(value)
    assert all(dataclasses.is_dataclass(kind) for kind in TYPES.values())
