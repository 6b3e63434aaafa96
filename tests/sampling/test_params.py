"""What `SamplingParams` takes, and that it stays what it was."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from jaxinfer import SamplingParams
from jaxinfer.sampling.ids import are_ids, token_ids
from tests.refusals import line

IDS = [[3, 4], (3, 4), range(3, 5), np.array([3, 4], np.uint8), [np.int64(3), 4], np.arange(3, 5)]
NO_IDS = [[1.7, 2], ["3"], [True, 2], [np.bool_(True)], np.array([1.0]), np.array([True]), np.array([[1, 2]]), b"hi"]
NO_IDS += ["12", [None], None, 5, {3: 4}, [[3]], [b"\x03"], [np.float32(3)], [3 + 0j], np.array(3)]


@pytest.mark.parametrize("ids", IDS, ids=str)
def test_ids_are_integers_of_any_kind(ids):
    assert are_ids(ids)
    assert token_ids(ids, "") == [3, 4]
    assert all(type(i) is int for i in token_ids(ids, ""))
    params = SamplingParams(
        stop_token_ids=ids,
        allowed_token_ids=ids,
        suppress_tokens=ids,
        begin_suppress_tokens=ids,
        bad_words_ids=[ids],
        logit_bias=dict.fromkeys(ids, 1.0),
    )
    for name, values in params.named_ids():
        assert list(values) == ([] if name.startswith("forced") else [3, 4])
        assert all(type(i) is int for i in values)


@pytest.mark.parametrize("ids", NO_IDS, ids=repr)
def test_nothing_else_is_made_an_id(ids):
    assert not are_ids(ids)
    assert line(lambda: token_ids(ids, "it must be")).startswith("it must be a list of token ids, not ")
    for name in ("stop_token_ids", "allowed_token_ids", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
        value = [ids] if name == "bad_words_ids" else ids
        if value is None or isinstance(value, int):
            continue  # not given; a list of one
        assert f"sampling parameter {name} is " in line(lambda name=name, value=value: SamplingParams(**{name: value}))


@pytest.mark.parametrize("key", ["3", 3.0, True, -1, 2**31])
def test_only_ids_are_biased(key):
    assert "sampling parameter logit_bias is " in line(lambda: SamplingParams(logit_bias={key: 1.0}))


def test_what_was_given_may_change_and_the_parameters_do_not():
    bias, ids, words, stop, sequences = {5: 100.0}, [5, 6], ["a"], ["b"], [[1, 2]]
    fields = {"logit_bias": bias, "allowed_token_ids": ids, "bad_words": words, "stop": stop}
    params = SamplingParams(**fields, bad_words_ids=sequences, suppress_tokens=ids)
    before = dataclasses.asdict(params)
    bias.clear()
    sequences[0].append(3)
    for values in (ids, words, stop, sequences):
        values.append(values[0])
    assert dataclasses.asdict(params) == before
    assert params.logit_bias == {5: 100.0}
    assert params.bad_words_ids == ((1, 2),)
    for change in (
        lambda: params.logit_bias.update({7: 1.0}),
        lambda: params.logit_bias.__setitem__(5, float("nan")),
        lambda: params.logit_bias.pop(5),
        lambda: params.logit_bias.clear(),
        lambda: params.logit_bias.setdefault(8, 1.0),
    ):
        with pytest.raises(TypeError, match="with_changes"):
            change()
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == SamplingParams(**before) == params
    assert params.with_changes(logit_bias={6: 1.0}).logit_bias == {6: 1.0}


def test_fewer_tokens_than_the_least_are_what_is_asked_for():
    params = SamplingParams(min_tokens=10).with_changes(max_tokens=4)
    assert (params.min_tokens, params.max_tokens) == (4, 4)
    assert "min_tokens is 10" in line(lambda: params.with_changes(min_tokens=10, max_tokens=4))


def test_changes_may_have_other_programs_names():
    params = SamplingParams(temperature=0.5, max_tokens=7, stop=["x"])
    changed = params.with_changes(max_new_tokens=3, stop_strings=["y"], num_return_sequences=2)
    assert changed == SamplingParams(temperature=0.5, max_tokens=3, stop=["y"], n=2)
    assert params.with_changes(do_sample=False).temperature == 0
    assert params.with_changes(do_sample=True).temperature == 0.5  # it is sampled already
    assert params.with_changes(do_sample=True, temp=0.7).temperature == 0.7
    assert SamplingParams(temperature=0.0).with_changes(do_sample=True).temperature == 1
    assert "max_tokens here, which is given too" in line(lambda: params.with_changes(max_tokens=3, max_new_tokens=3))
    assert "did you mean max_tokens" in line(lambda: params.with_changes(max_token=3))


def test_stop_strings_are_bounded():
    assert SamplingParams(stop="x" * 4096).stop_strings
    assert "4,096 characters" in line(lambda: SamplingParams(stop=["a", "x" * 4097]))


def test_half_of_a_surrogate_pair_is_no_text():
    for name in ("stop", "bad_words"):
        assert f"sampling parameter {name} is " in line(
            lambda name=name: SamplingParams(**{name: ["a\ud800"]}).check_texts()
        )
