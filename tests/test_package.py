"""What is installed: the package's data files too."""

import json
from importlib import metadata
from pathlib import Path

import pytest

import jaxinfer

MODEL = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
)


def installed_files() -> set[str]:
    """Files of the installed distribution, relative to where packages are installed."""
    # A build leaves jaxinfer.egg-info in the source tree, which looks like a distribution too but has no RECORD.
    distribution = next(d for d in metadata.distributions(name="jaxinfer") if d.read_text("RECORD"))
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("installed in editable mode: there is no wheel to look at")
    return {str(file) for file in distribution.files or ()}


def test_the_model_and_the_marker_of_type_hints_are_in_the_wheel():
    files = installed_files()
    assert "jaxinfer/py.typed" in files
    assert {f"jaxinfer/demo/model/{name}" for name in MODEL} <= files
    package = Path(jaxinfer.__file__).parent
    data = [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {f"jaxinfer/{path.relative_to(package).as_posix()}" for path in data} <= files


def test_only_the_package_is_installed():
    tops = {file.split("/")[0] for file in installed_files() if not file.startswith("..")}
    assert tops == {"jaxinfer", f"jaxinfer-{jaxinfer.__version__}.dist-info"}


def test_version_is_the_distribution_s():
    assert metadata.version("jaxinfer") == jaxinfer.__version__


def test_names_of_the_package():
    """What is used is imported then, and is not among them."""
    assert dir(jaxinfer) == sorted([*jaxinfer.__all__, "__version__"])
    assert all(hasattr(jaxinfer, name) for name in dir(jaxinfer))
    assert dir(jaxinfer) == sorted([*jaxinfer.__all__, "__version__"])


def test_what_is_told_to_install_is_to_be_had():
    """The package is on no index yet: extras are those of a copy of the repository."""
    package = Path(jaxinfer.__file__).parent
    files = [
        *package.rglob("*.py"),
        *(package.parent / "docs").glob("*"),
        *(package.parent / "tpu_scripts").glob("*.sh"),
    ]
    told = [path.name for path in files if path.is_file() and "install 'jaxinfer" in path.read_text(errors="replace")]
    assert told == []
