"""The bound of a step, against numbers worked out by hand."""

import numpy as np
import pytest

from jaxinfer.engine.programs import cache_layout
from jaxinfer.models.model import AbstractModel
from jaxinfer.plan import roofline
from jaxinfer.plan.slices import Chip, Device
from jaxinfer.sharding import make_mesh

# Two layers of 4 heads of 8, 2 key/value heads, width 32, MLP 64, 100 tokens of vocabulary; not tied.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
BODY = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32) + 32
HEAD = 100 * 32
CHIP = Chip("made up", 10**9, bandwidth=1e3, flops=1e4, link=1e2)


def bound(config, dtype, tensor, tokens, context, rows, platform="gpu", gathered=1, attention="auto"):
    model = AbstractModel.from_config(config, dtype)
    devices = [Device(i, platform) for i in range(tensor)]
    layout = cache_layout(model, make_mesh(f"tensor={tensor}", devices, 4, 2, 32) or devices[0], attention)
    return roofline.bound(model, CHIP, layout, tensor, tokens, context, rows, gathered=gathered)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_decoding(tensor):
    estimate = bound(CONFIG, "bfloat16", tensor, tokens=3, context=50, rows=3)
    kept = 2 // min(tensor, 2)  # key/value heads of a chip
    assert estimate.memory == pytest.approx(((BODY + HEAD) * 2 / tensor + 3 * 50 * 2 * 2 * kept * 8 * 2) / 1e3)
    attention = 2 * 2 * 4 * 8 * 3 * 50  # q.k and p.v, two layers, 32 features, 3 tokens, 50 keys
    assert estimate.compute == pytest.approx(2 * (3 * (BODY + HEAD) + attention) / tensor / 1e4)
    assert estimate.links == pytest.approx(5 * 2 * 3 * 32 * 2 * (tensor - 1) / tensor / 1e2)
    assert (estimate.flops, estimate.moved) == (estimate.compute * CHIP.flops, estimate.memory * CHIP.bandwidth)
    assert estimate.seconds == max(estimate.memory, estimate.compute, estimate.links)
    assert estimate.tokens_per_second == pytest.approx(3 / estimate.seconds)


def test_a_prompt_sees_half_of_itself_on_average_and_needs_one_tokens_logits():
    estimate = bound(CONFIG, "float32", 1, tokens=99, context=99, rows=1)
    assert estimate.compute == pytest.approx(2 * (99 * BODY + HEAD + 2 * 2 * 4 * 8 * 99 * 50) / 1e4)
    assert estimate.links == 0
    assert estimate.binds == "compute"


def test_a_tied_head_is_multiplied_too():
    tied = bound(CONFIG | {"tie_word_embeddings": True}, "bfloat16", 1, 1, 10, 1)
    assert tied == bound(CONFIG, "bfloat16", 1, 1, 10, 1)


def test_padding_of_the_cache_is_read_and_multiplied():
    """Three heads of 8 are kept as four of 128 by JAX's kernel for TPUs; by ours, up to 128 of all together."""
    config = CONFIG | {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    cases = ("gpu", "auto"), ("tpu", "jax"), ("tpu", "auto")
    plain, padded, ours = (bound(config, "bfloat16", 1, 3, 50, 3, name, attention=how) for name, how in cases)
    assert ours.moved - plain.moved == 3 * 50 * 2 * (128 - 2 * 3 * 8) * 2
    assert ours.flops == plain.flops
    assert padded.moved - plain.moved == 3 * 50 * 2 * 2 * (4 * 128 - 3 * 8) * 2
    assert padded.flops - plain.flops == 2 * 2 * 2 * (8 * 128 - 6 * 8) * 3 * 50


def test_states_are_read_and_written():
    """One layer has a short convolution of width 3, and keeps two inputs in float32."""
    types = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}
    decoding, longer = (bound(CONFIG | {"model_type": "lfm2"} | types, "bfloat16", 1, 3, size, 3) for size in (0, 50))
    weights = 4 * 32 * 32 + 3 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 2 * 8 + 2 * (3 * 64 * 32 + 2 * 32) + 32 + HEAD
    assert decoding.moved == 2 * weights + 3 * 2 * (2 * 32 * 4)
    assert longer.moved - decoding.moved == 3 * 50 * 2 * 2 * 8 * 2


def test_of_a_window_no_more_is_read_than_it_sees():
    config = CONFIG | {"model_type": "mistral", "sliding_window": 20}
    estimate = bound(config, "bfloat16", 1, tokens=3, context=50, rows=3)
    assert estimate.moved == (BODY + HEAD) * 2 + 3 * 20 * 2 * 2 * 2 * 8 * 2
    assert estimate.flops == 2 * (3 * (BODY + HEAD) + 2 * 2 * 4 * 8 * 3 * 20)
    assert bound(config, "bfloat16", 1, 3, 15, 3) == bound(CONFIG, "bfloat16", 1, 3, 15, 3)
    prompt = bound(config, "float32", 1, tokens=99, context=99, rows=1)
    seen = sum(min(i + 1, 20) for i in range(99))
    assert prompt.flops == pytest.approx(2 * (99 * BODY + HEAD + 2 * 2 * 4 * 8 * seen))
    assert prompt.moved == bound(CONFIG, "float32", 1, tokens=99, context=99, rows=1).moved, "each key once"


SPARSE = CONFIG | {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 64,
    "qkv_bias": False,
}


def test_experts_are_read_that_tokens_have():
    """Of six experts a token takes two: all are read in the long run, and each token is multiplied with two."""
    expert = 3 * 24 * 32
    rest = BODY + 2 * (6 * 32 + 32)  # routers, and gates of the shared experts
    for tokens in (1, 3, 100):
        estimate = bound(SPARSE, "bfloat16", 1, tokens=tokens, context=50, rows=tokens)
        hit = 6 * (1 - (1 - 2 / 6) ** tokens)
        read = (rest + HEAD + 2 * hit * expert) * 2 + tokens * 50 * 2 * 2 * 2 * 8 * 2
        assert estimate.moved == pytest.approx(read)
        attention = 2 * 2 * 4 * 8 * tokens * 50
        assert estimate.flops == pytest.approx(2 * (tokens * (rest + HEAD + 2 * 2 * expert) + attention))


def test_experts_that_shards_of_rows_share():
    """Each device has a part of them for the tokens of all, which come and go; the rest is each shard's own. All wait
    for the device that has most."""
    size, tokens = 2 * 6 * 3 * 24 * 32, 9
    own, shared = (bound(SPARSE, "bfloat16", 2, tokens, 50, tokens, gathered=n) for n in (1, 3))
    assert shared.sent - own.sent == pytest.approx(2 * 2 * tokens * 32 * 2 * 2)
    for estimate, gathered in ((own, 1), (shared, 3)):
        chance = 1 - (1 - 2 / 6) ** (tokens * gathered)
        experts = roofline.expected_maximum(3 // gathered, chance, 2 * gathered)
        rows = roofline.expected_maximum(2 * tokens * gathered, 1 / (2 * gathered), 2 * gathered)
        assert estimate.busiest_experts == pytest.approx(experts / (3 / gathered * chance))
        assert estimate.busiest_rows == pytest.approx(rows / tokens)
        rest = bound(CONFIG, "bfloat16", 2, tokens, 50, tokens)
        more = 2 * (6 * 32 + 32)
        assert estimate.moved - rest.moved == pytest.approx((more + size / 3 * experts) * 2 / 2)
        assert estimate.flops - rest.flops == pytest.approx(2 * (more * tokens / 2 + size / 6 * rows))


@pytest.mark.parametrize(
    ("count", "chance", "parts"), [(16, 0.2, 8), (2048, 1 / 8, 8), (16384, 1 / 32, 32), (1, 0.1, 4)]
)
def test_the_busiest(count, chance, parts):
    drawn = np.random.default_rng(0).binomial(count, chance, size=(20_000, parts)).max(axis=1)
    assert roofline.expected_maximum(count, chance, parts) == pytest.approx(drawn.mean(), rel=0.02)
    assert roofline.expected_maximum(count, chance, 1) == count * chance
    assert roofline.expected_maximum(count, 1.0, parts) == count
