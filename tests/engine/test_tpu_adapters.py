"""Adapters beside the weights, through the real TPU compiler."""

import pytest

from tests.engine.tpu import MIB, compiled, elements

pytest.importorskip("libtpu")


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        pytest.param({}, ("full_decode", "forward"), id="bfloat16", marks=pytest.mark.long),
        pytest.param({"quantization": "int8"}, ("full_decode",), id="int8", marks=pytest.mark.slow),
    ],
)
def test_eight_beside_the_8b(options, kinds):
    """Llama's widths, two layers, eight of rank 16: no collective more than without, and nothing of the size of a
    weight, or of all that adapters have, beside what is held."""
    case = {"topology": "v5e-8", "mesh": "tensor=8", "rows": 64, "tokens": 1024, "config": {"num_hidden_layers": 2}}
    kinds = [kind for own in kinds for kind in (own, f"adapted_{own}")]
    figures = compiled(case | options | {"adapters": [8, 16], "kinds": kinds})
    for plain, own in zip(figures[::2], figures[1::2], strict=True):
        print(own["key"], own["adapters"] / MIB, plain["temporaries"] / MIB, own["temporaries"] / MIB)
        assert own["adapters"] == pytest.approx(18.8 * MIB, rel=0.01), "halves that meet whole activations are on each"
        assert own["arguments"] == pytest.approx(own["held"], rel=0.03)
        assert own["aliased"] >= own["changed"]
        assert not own["copied"]
        for kind in ("all-reduce", "all-gather"):
            assert sorted(elements(own[kind])) == sorted(elements(plain[kind])), kind
        assert own["temporaries"] < plain["temporaries"] + 16 * MIB
