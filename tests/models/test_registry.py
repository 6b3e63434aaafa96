"""Which architecture a config.json is of, and families from outside of the package."""

import json
import sys
from types import ModuleType

import pytest

from jaxinfer import LLM, CheckpointError, SamplingParams
from jaxinfer.engine.deployment import read_deployment
from jaxinfer.models import gpt2, llama, mistral, qwen3, registry
from jaxinfer.models.decoder import DecoderForCausalLM
from jaxinfer.models.registry import Architecture, architecture, model_types, register, task_of
from jaxinfer.models.tasks import BOTH_WAYS, CLASSIFY, EMBED, GENERATE, with_task
from jaxinfer.models.wrapped import Wrapped
from tests.plain import CONFIG, random_tensors, write_checkpoint
from tests.refusals import change, line, refusal

OF_THE_HUB = {"PhiMoEForCausalLM": "PhimoeForCausalLM"}  # classes by their names in checkpoints' own code
OPTIONS = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "max_model_len": 64}


@pytest.fixture
def known():
    """The registry, put back afterwards."""
    before = dict(registry.REGISTRY)
    yield
    registry.REGISTRY.clear()
    registry.REGISTRY.update(before)


@pytest.mark.parametrize(
    ("model_type", "named", "module"),
    [
        ("llama", ["LlamaForCausalLM"], llama),
        ("llama", ["LlamaForCausalLM", "Another"], llama),
        ("llama", ["LlamaModel"], llama),
        ("llama", [], llama),
        ("llama", None, llama),
        ("mistral", ["MistralModel"], mistral),
        ("qwen3", ["Qwen3ForCausalLM"], qwen3),
        ("gpt2", ["GPT2LMHeadModel"], gpt2),
        ("gpt2", ["GPT2Model"], gpt2),
    ],
)
def test_what_is_chosen(model_type, named, module):
    assert architecture({"model_type": model_type, "architectures": named}) is module.ARCHITECTURE


def test_without_architectures():
    for model_type in model_types():
        entry = next(entry for entry in registry.REGISTRY.values() if entry.model_type == model_type)
        if not isinstance(entry.source, Wrapped):  # see test_wrapped
            assert architecture({"model_type": model_type}) is sys.modules[entry.source].ARCHITECTURE


def test_classes_are_transformers():
    pytest.importorskip("torch", reason="transformers has its lists beside its models")
    from transformers.models.auto import modeling_auto as theirs

    for name, entry in registry.REGISTRY.items():
        name = OF_THE_HUB.get(name, name)
        mappings = theirs.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, theirs.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        assert name in [mapping.get(entry.model_type) for mapping in mappings]


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        ("llama", ["LlamaForSequenceClassification"]),
        ("llama", ["LlamaForSequenceClassification", "LlamaForCausalLM"]),
        ("llama", ["MistralForCausalLM"]),
        ("llama", ["MistralModel"]),
        ("llama", ["LlamaLMHeadModel"]),
        ("llama", ["llamaforcausallm"]),
        ("llama", [""]),
        ("mistral", ["LlamaForCausalLM"]),
        ("gpt2", ["GPT2DoubleHeadsModel"]),
        ("qwen2", ["Qwen2ForRewardModel"]),
    ],
)
def test_another_class(model_type, named):
    text = line(lambda: architecture({"model_type": model_type, "architectures": named}), CheckpointError)
    supported = next(name for name, entry in registry.REGISTRY.items() if entry.model_type == model_type)
    assert text == f"config.json: architectures is {named!r}: supported with model_type {model_type} are {supported}"


@pytest.mark.parametrize("named", ["LlamaForCausalLM", 5, {}, [5], [None], [["LlamaForCausalLM"]], [{}]])
def test_what_names_no_class(named):
    text = line(lambda: architecture({"model_type": "llama", "architectures": named}), CheckpointError)
    assert "it must be a list of names of classes" in text


@pytest.mark.parametrize("model_type", ["berd", None, 5, ["lama"], {}])
def test_an_unknown_type(model_type):
    text = line(lambda: architecture({"model_type": model_type, "architectures": ["LlamaForCausalLM"]}))
    assert text == f"model_type {model_type!r} is not supported; `jaxinfer models` lists all"
    text = line(lambda: architecture({"model_type": "llama5"}))
    assert text == "model_type 'llama5' is not supported, and 'llama4' is; `jaxinfer models` lists all"
    assert registry.nearest("gemma5").startswith(", and 'gemma4")
    assert registry.nearest("phi4") == ", and 'phi3' is; `jaxinfer models` lists all"


@pytest.mark.parametrize(
    ("model_type", "named", "task"),
    [
        ("bert", ["BertModel"], EMBED),
        ("bert", ["BertForMaskedLM"], EMBED),
        ("bert", None, EMBED),
        ("bert", ["BertForSequenceClassification"], CLASSIFY),
        ("new", ["NewForSequenceClassification"], CLASSIFY),
        ("llama", ["LlamaForSequenceClassification"], CLASSIFY),
        ("llama", ["LlamaForCausalLM"], GENERATE),
        ("llama", ["LlamaModel"], GENERATE),
        ("gemma3_text", ["Gemma3TextForSequenceClassification"], CLASSIFY),
    ],
)
def test_what_a_class_is_for(model_type, named, task):
    data = {"model_type": model_type, "architectures": named}
    assert task_of(data) == task
    assert architecture(with_task(data, task)).parse is not None
    assert task_of(data | {BOTH_WAYS: True}) == (EMBED if task == GENERATE else task)


@pytest.mark.parametrize(
    ("model_type", "named", "task", "supported"),
    [
        ("bert", ["BertForTokenClassification"], EMBED, "BertModel, BertForMaskedLM"),
        ("bert", ["BertForQuestionAnswering"], EMBED, "BertModel"),
        ("bert", ["BertForSequenceClassification"], EMBED, "BertModel"),
        ("bert", ["BertModel"], CLASSIFY, "BertForSequenceClassification"),
        ("bert", None, CLASSIFY, "BertForSequenceClassification"),
        ("bert", [5], CLASSIFY, "BertForSequenceClassification"),
        ("roberta", ["BertModel"], EMBED, "RobertaModel"),
        ("llama", ["LlamaForTokenClassification"], CLASSIFY, "LlamaForSequenceClassification"),
        ("gemma3", ["Gemma3ForSequenceClassification"], CLASSIFY, "nothing"),
    ],
)
def test_other_heads_are_refused_by_name(model_type, named, task, supported):
    data = with_task({"model_type": model_type, "architectures": named}, task)
    text = line(lambda: architecture(data), CheckpointError)
    assert f"architectures is {named!r}: to {task} with model_type {model_type} it can be {supported}" in text


def test_an_encoder_makes_no_text(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    refusal(tmp_path, "model_type 'bert' is an encoder: it makes no text", runner="generate")
    assert "jaxinfer_task is 'sing'" in line(lambda: architecture(with_task({"model_type": "bert"}, "sing")))


@pytest.mark.parametrize("labels", [5, {}, {"0": "a", "2": "b"}, {"a": "0"}])
def test_labels_that_number_nothing(labels):
    data = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "id2label": labels}
    assert "id2label is " in line(lambda: registry.parse_config(with_task(data, CLASSIFY)), CheckpointError)


def test_a_classifier_is_no_language_model(tmp_path, cli):
    """Its body is Llama's, and it may even have a head that is tied: nothing of it is loaded."""
    config = CONFIG | {"tie_word_embeddings": True}
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    change(folder, architectures=["LlamaForSequenceClassification"])
    refusal(folder, "architectures is ['LlamaForSequenceClassification']", "LlamaForCausalLM", runner="generate")
    assert "LlamaForSequenceClassification" in cli("generate", "x", "-m", folder).error()


def test_a_deployment_of_a_classifier(tmp_path, cli):
    file = tmp_path / "deployment.yaml"
    fields = "".join(f"  {name}: {json.dumps(value)}\n" for name, value in CONFIG.items())
    file.write_text(f"model: x/y\narchitecture:\n{fields}  architectures: [LlamaForSequenceClassification]\n")
    assert read_deployment(file).architecture["architectures"]
    assert "texts/s" in cli("plan", file, "--topology", "h100-1").out


def test_a_body_without_a_head(tmp_path):
    """Tied it is whole; otherwise the loader says what is missing."""
    tied = CONFIG | {"tie_word_embeddings": True, "architectures": ["LlamaModel"]}
    tensors = random_tensors(tied)
    with LLM(write_checkpoint(tmp_path / "tied", tied, tensors), **OPTIONS) as llm:
        assert llm.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    folder = write_checkpoint(tmp_path / "apart", tied | {"tie_word_embeddings": False}, tensors)
    refusal(folder, "missing tensors: lm_head.weight")


def scaled(fields):
    """A family of its own in one field: another epsilon."""
    fields.refuse("mine", 1)
    return llama.parse(fields)


MINE = Architecture(scaled, DecoderForCausalLM, llama.weights)


@pytest.mark.parametrize("as_module", [False, True])
def test_a_family_from_outside(known, tmp_path, cli, monkeypatch, as_module):
    source = MINE
    if as_module:
        source = "mine_for_jaxinfer"
        monkeypatch.setitem(sys.modules, source, module := ModuleType(source))
        module.ARCHITECTURE = MINE
    config = CONFIG | {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    refused = config | {"model_type": "llama"}
    plain = write_checkpoint(tmp_path / "plain", CONFIG, tensors := random_tensors(CONFIG))
    folder = write_checkpoint(tmp_path / "model", config, tensors)
    refusal(folder, "'mine' is not supported")
    register("MineForCausalLM", "mine", source, "mine alone")
    assert architecture(config) is architecture({"model_type": "mine"}) is MINE
    assert "MineForCausalLM" in line(lambda: architecture(refused))
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    tokens = []
    for model in (plain, folder):
        with LLM(model, **OPTIONS) as llm:
            tokens.append(llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids)
    assert tokens[0] == tokens[1]
    change(folder, mine=2)
    refusal(folder, "config.json: mine is 2")
    row = {"model_type": "mine", "hf_class": "MineForCausalLM", "makes": "text", "known_as": "mine alone"}
    assert row in json.loads(cli("models", "--json").out)


def test_another_class_of_a_known_type(known):
    """The first one stays what its type means where no class is named."""
    register("LlamaForMine", "llama", MINE)
    assert architecture({"model_type": "llama", "architectures": ["LlamaForMine"]}) is MINE
    for named in (None, ["LlamaForCausalLM"], ["LlamaModel"]):
        assert architecture({"model_type": "llama", "architectures": named}) is llama.ARCHITECTURE
    text = line(lambda: architecture({"model_type": "llama", "architectures": ["LlamaForNothing"]}))
    assert text.endswith("are LlamaForCausalLM, LlamaForMine")
    register("LlamaForMine", "llama", llama.ARCHITECTURE)  # instead
    assert architecture({"model_type": "llama", "architectures": ["LlamaForMine"]}) is llama.ARCHITECTURE


def test_what_is_no_architecture(known):
    with pytest.raises(TypeError, match="source is a ModuleMeta"):
        register("MineForCausalLM", "mine", DecoderForCausalLM)


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        ("json", "json, which has no ARCHITECTURE"),
        ("no.such.module", "no.such.module, which can't be imported: No mod"),
    ],
)
def test_a_module_that_has_none(known, module, problem):
    register("MineForCausalLM", "mine", module)
    config = {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    assert f"MineForCausalLM was registered with module {problem}" in line(lambda: architecture(config))
