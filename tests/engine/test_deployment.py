"""Deployments in YAML files: those that come with the project, what is refused, and what is loaded from one."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.deployment import FIELDS, read_deployment
from jaxinfer.sharding import parse_mesh
from tests.deployments import FILES, model_of_deployment
from tests.refusals import line

# As the models' own pages on the hub count them in safetensors, less what lies beside a text model: vision towers and
# projectors, counted by the shapes of their tensors there. The fields of `architecture` are those of the pages'
# config.json; what that leaves out (Gemma's vocabulary, heads of the 4B) is transformers' default.
PARAMETERS = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "openai-community/gpt2": 124_439_808,
    "google/gemma-3-27b-it": 27_432_406_640 - 423_060_336,
    "google/gemma-3-4b-it": 4_300_079_472 - 419_816_304,
    "microsoft/phi-4": 14_659_507_200,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696 - 576_388_336,
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": 24_011_361_280 - 438_958_080,
    "ibm-granite/granite-3.3-8b-instruct": 8_170_864_640,
    "allenai/Olmo-3-32B-Think": 32_233_522_176,
    # 20.91 and 116.83 billion in their paper (arXiv:2508.10925); their files count bytes of mxfp4.
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    # Of what is written here; their pages say 25.2, 35 and 32 billion.
    "google/gemma-4-26B-A4B-it": 25_233_141_790,
    "Qwen/Qwen3.6-35B-A3B": 34_660_610_688,
    "ibm-granite/granite-4.0-h-small": 32_207_337_984,
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_those_that_are_there(file):
    from jaxinfer.plan.slices import names

    deployment = read_deployment(file)
    assert file.name.endswith(f"_{deployment.topology}.yaml")
    assert deployment.topology in names()
    assert set(deployment.options) >= {"dtype", "max_model_len", "max_num_seqs", "architecture"}
    assert parse_mesh(deployment.options.get("mesh", "tensor=1"))


@pytest.mark.parametrize("model", PARAMETERS)
def test_architectures_are_the_published_ones(model):
    deployments = [deployment for deployment in map(read_deployment, FILES) if deployment.model == model]
    assert deployments
    assert all(deployment.architecture == deployments[0].architecture for deployment in deployments)
    params = model_of_deployment(deployments[0]).params
    assert sum(math.prod(spec.shape) for spec in params.values()) == PARAMETERS[model]


def test_there_is_no_other():
    assert {read_deployment(file).model for file in FILES} == set(PARAMETERS)


@pytest.mark.parametrize(
    ("text", "number", "facts"),
    [
        ("model: x\nmax_num_sequences: 8\n", 2, ["no field 'max_num_sequences'", "max_num_seqs", "topology"]),
        ("model: x\ntoken: secret\n", 2, ["no field 'token'"]),
        ("model: x\nseed: 1\nmodel: y\n", 3, ["model is there twice"]),
        ("model: x\narchitecture:\n  model_type: llama\n  model_type: gpt2\n", 4, ["model_type is there twice"]),
        ("model: x\nmax_num_seqs: many\n", 2, ["max_num_seqs is 'many'", "an integer from 1 to 4096"]),
        ("model: x\nmax_model_len: 1.5\n", 2, ["max_model_len is 1.5", "an integer"]),
        ("model: x\n\n# so\nwarmup: 1\n", 4, ["warmup is 1", "true or false"]),
        ("model: x\ndtype: int3\n", 2, ["dtype is 'int3'", "bfloat16"]),
        ("model: x\nmesh: 8\n", 2, ["mesh is 8", "a string"]),
        ("model: x\nrevision: 2024-01-01\n", 2, ["revision is ", "a string"]),
        ("model: x\nseed: null\n", 2, ["seed is None"]),
        ("model: 5\n", 1, ["model is 5", "a folder or a hub id"]),
        ("model: x\ntopology: 8\n", 2, ["topology is 8", "v5e-8"]),
        ("model: x\narchitecture: big\n", 2, ["architecture is 'big'", "config.json"]),
        ("model: x\narchitecture:\n  model_type: bert\n", 2, ["model_type is 'bert'", "llama"]),
        ("model: [x\n", 2, ["not usable as YAML", "expected"]),
        ("\tmodel: x\n", 1, ["not usable as YAML"]),
        ("model: x\n---\nmodel: y\n", 2, ["another document"]),
        ("model: &a x\ntopology: *a\n", 2, ["*a is an alias"]),
        ("model: !!python/name:os.system x\n", 1, ["python/name:os.system"]),
        ("model: x\n<<: {seed: 1}\n", 2, ["a field's name must be a word"]),
        ("topology: v5e-8\n", None, ["model is missing"]),
        ("", None, ["`name: value`"]),
        ("- model\n", None, ["`name: value`"]),
        (f"model: x\nseed: {'9' * 5000}\n", None, ["not usable as YAML"]),
        (f"model: {'[' * 5000}\n", None, ["nested too deeply"]),
        ("model: \0\n", None, ["not usable as YAML"]),
        ("#" * 2**20 + "\nmodel: x\n", None, ["bytes are more than"]),
    ],
)
def test_what_is_refused(tmp_path, text, number, facts):
    file = tmp_path / "deployment.yaml"
    file.write_text(text)
    message = line(lambda: read_deployment(file))
    assert message.startswith(f"{file}:{number}: " if number else f"{file}: ")
    assert all(fact in message for fact in facts), message


def test_numbers_as_json_writes_them(tmp_path):
    file = tmp_path / "deployment.yaml"
    file.write_text("model: x\narchitecture:\n  model_type: llama\n  rms_norm_eps: 1e-05\n  rope_theta: 5E+5\n")
    assert read_deployment(file).architecture == {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 5e5}


def test_every_option_of_loading_is_a_field():
    assert set(EngineConfig.__annotations__) - set(FIELDS) == {"token", "on_progress"}


def test_reading_one_needs_no_jax():
    code = "import sys; from jaxinfer.engine.deployment import read_deployment; read_deployment(sys.argv[1])"
    code += "; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, FILES[0]], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# Loading from one


@pytest.fixture
def deployment(checkpoints, tmp_path):
    """A file for a tiny checkpoint, with fields changed (... removes one)."""

    def write(**changes: object) -> Path:
        folder = checkpoints("llama").folder
        fields = {
            "model": str(folder),
            "topology": "v5e-1",
            "dtype": "float32",
            "max_model_len": 64,
            "max_num_seqs": 4,
            "architecture": json.loads((folder / "config.json").read_text()),
        } | changes
        file = tmp_path / "deployment.yaml"
        file.write_text(yaml.safe_dump({name: value for name, value in fields.items() if value is not ...}))
        return file

    return write


def test_an_llm_from_one(deployment, checkpoints):
    params = SamplingParams(temperature=0, max_tokens=4)
    with LLM(checkpoints("llama").folder) as llm:
        expected = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids
    with LLM.from_config(deployment(), max_num_seqs=2) as llm:
        assert llm.sizes.max_model_len == 64
        assert llm.engine.scheduler.max_rows == 2  # what is given comes before what the file says
        assert llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids == expected


def test_another_model_than_the_architecture(deployment, checkpoints):
    architecture = yaml.safe_load(deployment().read_text())["architecture"]
    folder = checkpoints("llama").folder
    for field, value, problem in [
        ("num_hidden_layers", 3, f"num_layers is {architecture['num_hidden_layers']}, and the deployment's"),
        ("vocab_size", 1000, "architecture says 1000"),
        ("model_type", "mistral", "model_type is 'llama'"),
        ("hidden_size", "wide", "architecture: hidden_size is 'wide'"),
    ]:
        file = deployment(architecture=architecture | {field: value})
        text = line(lambda file=file: LLM.from_config(file))
        assert problem in text
        assert field == "hidden_size" or text.startswith(str(folder / "config.json"))
    qwen = checkpoints("qwen3").folder
    assert "model_type is 'qwen3'" in line(lambda: LLM.from_config(deployment(), model=qwen))
    with LLM.from_config(deployment(architecture=...), model=qwen) as llm:
        assert llm.sizes.max_model_len == 64


def test_a_file_without_an_architecture_of_another_spelling(deployment, checkpoints):
    """Both spellings of transformers are the same architecture."""
    architecture = yaml.safe_load(deployment().read_text())["architecture"]
    rope = architecture.pop("rope_parameters")
    assert rope["rope_type"] == "default"
    with LLM.from_config(deployment(architecture=architecture | {"rope_theta": rope["rope_theta"]})):
        pass


def test_no_such_file(tmp_path):
    assert "none.yaml" in line(lambda: LLM.from_config(tmp_path / "none.yaml"), FileNotFoundError)
    line(lambda: LLM.from_config(tmp_path), OSError)
