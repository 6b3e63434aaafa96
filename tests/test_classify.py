"""`LLM.classify` against transformers' classes: one of several, several, a regression; single texts and pairs."""

import json
import shutil

import numpy as np
import pytest

from jaxinfer import LLM, RequestError, UnsupportedError
from jaxinfer.errors import CheckpointError
from tests.checkpoints import building
from tests.models.families import CLASSES, Variant
from tests.models.references import error, found_or_made, random_model
from tests.refusals import line
from tests.test_embed import END, FIELDS, ours, tokenizer

LABELS = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
KINDS = {
    "single": ("BertConfig", LABELS),
    "multi": ("BertConfig", LABELS | {"problem_type": "multi_label_classification"}),
    "regression": ("BertConfig", {"num_labels": 1, "problem_type": "regression"}),
    "one": ("BertConfig", {"num_labels": 1}),
    "decoder": ("Qwen3Config", LABELS | {"num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 299}),
}
TEXTS = ["a", ("one text", "and another"), "y" * 90, "", ("", "b")]


def row(text):
    """Its tokens and their types."""
    if isinstance(text, str):
        ids = [*ours(text), END]
        return ids, [0] * len(ids)
    first, second = ([*ours(part), END] for part in text)
    return first + second, [0] * len(first) + [1] * len(second)


def make(kind):
    def made(folder):
        import torch

        config, fields = KINDS[kind]
        model = random_model(Variant(config, FIELDS | fields, auto=CLASSES), 0.2, 0.2)
        with building(folder) as own:
            model.save_pretrained(own)
            tokenizer(own)
            with torch.no_grad():
                logits = []
                for ids, types in map(row, TEXTS):
                    typed = {"token_type_ids": torch.tensor([types])} if config == "BertConfig" else {}
                    logits.append(model(torch.tensor([ids]), **typed).logits[0])
                logits = torch.stack(logits)
                probs = {"single": logits.softmax(1), "decoder": logits.softmax(1), "regression": logits}
                np.savez(own / "reference.npz", logits=logits.numpy(), probs=probs.get(kind, logits.sigmoid()).numpy())

    return made


@pytest.fixture(scope="module")
def folders(checkpoints):
    return {kind: found_or_made(checkpoints.root / "classes", kind, "large", make(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_those_of_transformers(folders, kind):
    reference = np.load(folders[kind] / "reference.npz")
    with LLM(folders[kind], max_num_batched_tokens=128) as llm:
        assert llm.task == "classify"
        outputs = llm.classify(TEXTS, use_tqdm=False)
        logits = np.stack([o.outputs.probs for o in llm.classify(TEXTS, use_activation=False, use_tqdm=False)])
        alone = np.stack([llm.classify([text], use_tqdm=False)[0].outputs.probs for text in TEXTS])
    probs = np.stack([output.outputs.probs for output in outputs])
    assert error(logits, reference["logits"]) < 1e-5
    assert error(probs, reference["probs"]) < 1e-5
    np.testing.assert_array_equal(alone, probs)
    labels = ["cat", "dog", "owl"] if probs.shape[1] == 3 else ["LABEL_0"]
    best = reference["probs"].argmax(axis=1)
    assert [output.outputs.label_id for output in outputs] == best.tolist()
    assert [output.outputs.label for output in outputs] == [labels[i] for i in best]
    assert [output.prompt_token_ids for output in outputs] == [row(text)[0] for text in TEXTS]


def test_over_devices(folders):
    reference = np.load(folders["single"] / "reference.npz")
    with LLM(folders["single"], mesh="data=4,tensor=2", max_num_batched_tokens=512) as llm:
        probs = np.stack([output.outputs.probs for output in llm.classify(TEXTS, use_tqdm=False)])
    assert error(probs, reference["probs"]) < 1e-5


def test_what_is_refused(folders, tmp_path):
    with LLM(folders["single"]) as llm:
        assert "gives texts classes (LLM.classify, " in line(lambda: llm.embed("a"), UnsupportedError)
        assert "gives texts classes (LLM.classify, " in line(lambda: llm.generate("a"), UnsupportedError)
        assert "text 1: the text has 164 tokens" in line(
            lambda: llm.classify(["a", ("b" * 99, "c" * 63)]), RequestError
        )
        cut = llm.classify([("b" * 99, "c" * 63)], truncate=True, use_tqdm=False)[0]
        assert len(cut.prompt_token_ids) == 160
        for wrong in (("a", "b", "c"), ["a", "b"], ("a", None)):
            problem = line(lambda wrong=wrong: llm.classify([wrong]), RequestError)
            assert f"a pair is a tuple of two texts, strings or token ids, and not {wrong}" in problem
    copy = tmp_path / "copy"
    shutil.copytree(folders["single"], copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"problem_type": "ranking"}))
    assert "problem_type is 'ranking'" in line(lambda: LLM(copy), CheckpointError)
