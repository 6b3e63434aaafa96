"""Folders of sentence-transformers: every spelling and module, and what is not done is refused by name."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer import CheckpointError
from jaxinfer.checkpoint.sentence import SentenceModel, read_sentence_model, read_steps
from jaxinfer.layers.vectors import TORCH_ACTIVATIONS, Dense, Normalize, VectorNorm
from jaxinfer.tasks.embed import VectorOptions, finished
from tests.refusals import line

OLD, NEW = "sentence_transformers.models", "sentence_transformers.base.modules"
RNG = np.random.default_rng(0)


def write(folder, *modules, **said):
    """A folder with these modules after the transformer: (class, configuration, tensors)."""
    entries = [{"idx": 0, "name": "0", "path": "", "type": f"{OLD}.Transformer"}]
    for i, (kind, config, tensors) in enumerate(modules, 1):
        path = f"{i}_{kind.rpartition('.')[2]}"
        entries.append({"idx": i, "name": str(i), "path": path, "type": kind})
        if config is not None:
            (folder / path).mkdir()
            (folder / path / "config.json").write_text(json.dumps(config))
        if tensors:
            save_file(tensors, folder / path / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(entries))
    if said:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(said))
    return folder


MEAN = (f"{OLD}.Pooling", {"word_embedding_dimension": 6, "pooling_mode_mean_tokens": True}, None)


def dense(**config):
    tensors = {"linear.weight": RNG.standard_normal((4, 6)), "linear.bias": RNG.standard_normal(4)}
    config = {"in_features": 6, "out_features": 4, "bias": True} | config
    return f"{OLD}.Dense", config, {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ("mean_sqrt_len_tokens",)),
        ({"pooling_mode_lasttoken": True, "pooling_mode_weightedmean_tokens": True}, ("weightedmean", "lasttoken")),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("max", "mean")),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": False}, ("mean",)),
        ({}, ("mean",)),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 6}, ("lasttoken",)),
        ({"pooling_mode": ["mean", "cls"]}, ("mean", "cls")),  # in its own order
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, ("cls",)),
    ],
)
@pytest.mark.parametrize(
    "kind", [f"{OLD}.Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"]
)
def test_poolings_in_all_spellings(tmp_path, config, pooling, kind):
    model = read_sentence_model(write(tmp_path, (kind, config, None)))
    assert (model.pooling, model.include_prompt, model.transformer) == (pooling, True, tmp_path)


def test_a_folder_without_modules(tmp_path):
    assert read_sentence_model(tmp_path) is None


def test_what_a_folder_says(tmp_path):
    pooling = (MEAN[0], MEAN[1] | {"include_prompt": False}, None)
    prompts = {"query": "query: ", "document": ""}
    said = {"prompts": prompts, "default_prompt_name": "query", "similarity_fn_name": "dot_product", "truncate_dim": 3}
    folder = write(tmp_path, pooling, **said)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 256, "do_lower_case": true}')
    model = read_sentence_model(folder)
    expected = SentenceModel(tmp_path, ("mean",), False, 6, (), prompts, "query", "dot", 3, 256, True)
    assert model == expected
    assert model.output_size(6) == 3


def test_old_folders(tmp_path):
    """The transformer has a folder of its own, a Normalize has none, and Dense is pickled."""
    torch = pytest.importorskip("torch")
    folder = write(tmp_path, MEAN, dense(), (f"{NEW}.normalize.Normalize", None, None), (f"{OLD}.Dropout", {}, None))
    entries = json.loads((folder / "modules.json").read_text())
    entries[0]["path"] = "0_RoBERTa"
    (folder / "0_RoBERTa").mkdir()
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "0_RoBERTa" / "sentence_roberta_config.json").write_text('{"max_seq_length": 128}')
    (folder / "2_Dense" / "model.safetensors").unlink()
    weight, bias = RNG.standard_normal((4, 6)).astype(np.float32), np.ones(4, np.float32)
    tensors = {"linear.weight": torch.tensor(weight), "linear.bias": torch.tensor(bias)}
    torch.save(tensors, folder / "2_Dense" / "pytorch_model.bin")
    model = read_sentence_model(folder)
    assert (model.transformer, model.max_seq_length) == (folder / "0_RoBERTa", 128)
    assert [step for step, _ in model.steps] == [Dense(6, 4), Normalize()]
    weights = read_steps(model)
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    vectors = x
    for (step, _), own in zip(model.steps, weights, strict=True):
        vectors = step(vectors, own)
    expected = np.tanh(x @ weight.T + bias)
    np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-5)
    assert model.output_size(6) == 4


def test_steps_against_torch():
    torch = pytest.importorskip("torch")
    x = RNG.standard_normal((5, 6)).astype(np.float32) * 4
    for name, function in TORCH_ACTIVATIONS.items():
        expected = getattr(torch.nn, name)()(torch.tensor(x)).numpy()
        np.testing.assert_allclose(np.asarray(function(x)), expected, rtol=1e-5, atol=1e-6, err_msg=name)
    norm = torch.nn.LayerNorm(6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    own = {f"norm.{name}": tensor.detach().numpy() for name, tensor in norm.named_parameters()}
    np.testing.assert_allclose(VectorNorm(6)(x, own), norm(torch.tensor(x)).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [4, 6])
def test_residuals(width):
    step = Dense(6, width, bias=False, activation="ReLU", residual=True)
    weights = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in step.shapes.items()}
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    beside = x if width == 6 else x @ weights["residual.weight"].T
    expected = np.maximum(x @ weights["linear.weight"].T, 0) + beside
    np.testing.assert_allclose(step(x, weights), expected, rtol=1e-5, atol=1e-6)


def test_vectors_are_normed_after_they_are_cut():
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    cut = np.asarray(finished(x, VectorOptions(2, True)))
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(finished(x, VectorOptions(2, False)), x[:, :2])


UNKNOWN = ["Router", "Asym", "WeightedLayerPooling", "CNN", "LSTM", "BoW", "WordWeights", "CLIPModel", "SpladePooling"]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_other_modules_are_refused_by_name(tmp_path, kind):
    folder = write(tmp_path, MEAN, (f"{OLD}.{kind}", {}, None))
    assert f"'{kind}' is not supported here" in line(lambda: read_sentence_model(folder), CheckpointError)
    (folder / "modules.json").write_text(json.dumps([{"path": "", "type": f"{OLD}.{kind}"}]))
    assert f"'{kind}' is not supported here" in line(lambda: read_sentence_model(folder), CheckpointError)


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        ({}, "it must be a list of 1 to 32 modules"),
        ([], "it must be a list of 1 to 32 modules"),
        ([{}] * 33, "it must be a list of 1 to 32 modules"),
        ([5], "[0] is 5: it must have a type and a path"),
        ([{"type": 5, "path": ""}], "it must have a type and a path"),
        ([{"type": "Transformer", "path": None}], "it must have a type and a path"),
        ([{"type": "Transformer", "path": "../other"}], "it must be the name of something in"),
        ([{"type": "Transformer", "path": "/etc"}], "it must be the name of something in"),
        ([{"type": "Transformer", "path": "a\0b"}], "it must be the name of something in"),
        ([{"type": "Transformer", "path": ""}], "the module after the transformer must be a Pooling"),
        ([{"type": "Transformer", "path": ""}, {"type": "Dense", "path": ""}], "must be a Pooling"),
    ],
)
def test_hostile_modules(tmp_path, modules, problem):
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert problem in line(lambda: read_sentence_model(tmp_path))


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        ((MEAN[0], {"pooling_mode": "sum"}, None), "pooling_mode is 'sum': it must be one or several of cls, max"),
        ((MEAN[0], {"pooling_mode": []}, None), "pooling_mode is []"),
        ((MEAN[0], {"pooling_mode": [["cls"]]}, None), "pooling_mode is [['cls']]"),
        ((MEAN[0], {"pooling_mode": ["cls"] * 7}, None), "pooling_mode is "),
        ((MEAN[0], {"pooling_mode_mean_tokens": "yes"}, None), "it must be true or false"),
        ((MEAN[0], {"pooling_mode_attention": True}, None), "pooling_mode_attention is True: supported are"),
        ((MEAN[0], {"word_embedding_dimension": -6}, None), "word_embedding_dimension is -6"),
        ((MEAN[0], {"include_prompt": 1}, None), "include_prompt is 1"),
        (dense(activation_function="os.system"), "activation_function is 'os.system': supported are torch.nn's"),
        (dense(activation_function="torch.nn.Softmax"), "activation_function is 'torch.nn.Softmax'"),
        (dense(activation_function=5), "activation_function is 5"),
        (dense(in_features=0), "in_features is 0"),
        (dense(module_input_name="token_embeddings"), "module_input_name is 'token_embeddings'"),
        ((f"{OLD}.LayerNorm", {}, None), "dimension is missing"),
    ],
)
def test_bad_fields_of_modules(tmp_path, module, problem):
    modules = (module,) if "Pooling" in module[0] else (MEAN, module)
    text = line(lambda: read_sentence_model(write(tmp_path, *modules)), CheckpointError)
    assert problem in text
    assert str(tmp_path) in text


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"prompts": ["query: "]}, "prompts is ['query: ']: it must be an object"),
        ({"prompts": {"query": 5}}, "prompts is {'query': 5}"),
        ({"prompts": {"query": "q"}, "default_prompt_name": "document"}, "it must be one of query"),
        ({"similarity_fn_name": "maxsim"}, "similarity_fn_name is 'maxsim': supported are cosine"),
        ({"truncate_dim": 0}, "truncate_dim is 0"),
        ({"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'"),
    ],
)
def test_bad_settings(tmp_path, said, problem):
    assert problem in line(lambda: read_sentence_model(write(tmp_path, MEAN, **said)), CheckpointError)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"max_seq_length": 0}, "max_seq_length is 0"),
        ({"do_lower_case": 1}, "do_lower_case is 1"),
        ({"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
        ({"query_length": 32}, "query_length is 32"),
        ({"modality_config": {"message": {"format": "flat"}}}, "that a chat template writes are not supported"),
        (
            {"modality_config": {"text": {"method_output_name": "pooler_output"}}},
            "method_output_name is 'pooler_output'",
        ),
    ],
)
def test_bad_lengths(tmp_path, fields, problem):
    folder = write(tmp_path, MEAN)
    (folder / "sentence_bert_config.json").write_text(json.dumps(fields))
    assert problem in line(lambda: read_sentence_model(folder), CheckpointError)


def test_weights_that_do_not_fit(tmp_path):
    kind, config, tensors = dense()
    wrong = {"linear.weight": tensors["linear.weight"].T.copy(), "linear.other": tensors["linear.bias"]}
    model = read_sentence_model(write(tmp_path, MEAN, (kind, config, wrong)))
    text = line(lambda: read_steps(model), CheckpointError)
    assert "missing tensors: linear.bias; unknown tensors: linear.other; wrong shapes: linear.weight" in text


def test_modules_that_do_not_fit_each_other(tmp_path):
    model = read_sentence_model(
        write(tmp_path, MEAN, dense(in_features=5), (f"{OLD}.LayerNorm", {"dimension": 9}, None))
    )
    assert "takes vectors of 5, and those before it are of 6" in line(lambda: model.output_size(6), CheckpointError)
    assert "hidden states are 8 wide" in line(lambda: model.output_size(8), CheckpointError)
