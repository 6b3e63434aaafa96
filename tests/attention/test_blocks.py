"""Block sizes of the TPU's kernel: JAX's own table, for the device that a program is for."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.tuned_block_sizes import TUNED_BLOCK_SIZES

from jaxinfer.attention.blocks import KEYS, QUERIES, block_sizes

V5E, V5P, V6E = "TPU v5 lite", "TPU v5", "TPU v6 lite"


def sizes(kind, heads, kv_heads, page_size, length, tokens, head_dim=128, dtype="bfloat16", decode_only=False):
    q = jax.ShapeDtypeStruct((tokens, heads, head_dim), jnp.dtype(dtype))
    kv = jax.ShapeDtypeStruct((99, page_size, 2 * kv_heads, head_dim), jnp.dtype(dtype))
    blocks = block_sizes(kind, q, kv, -(-length // page_size), decode_only)
    assert (blocks.limit is None) == (kind in ("TPU v4", "TPU7x") or dtype != "bfloat16" or head_dim > 128)
    return blocks[:2]


@pytest.mark.parametrize(("kind", "name"), [(V5E, "TPU v5"), (V5P, "TPU v5"), (V6E, "TPU v6")])
def test_measured(kind, name):
    """What is in the table is what is taken."""
    asked = 0
    for key, value in list(TUNED_BLOCK_SIZES[name].items())[::7]:
        _, _, heads, kv_heads, head_dim, page_size, tokens, length = key
        if length == 1280:
            continue
        assert sizes(kind, heads, kv_heads, page_size, length, tokens, head_dim) == value, key
        asked += 1
    assert asked > 50


@pytest.mark.parametrize(
    ("kind", "name", "asked", "nearest", "expected"),
    [
        # Llama 8B on one chip and on 8, sequences longer than any in the table
        (V6E, "TPU v6", (32, 8, 64, 8192, 512), (32, 8, 64, 512, 1024), (16, 32)),
        (V5E, "TPU v5", (4, 1, 128, 32768, 2048), (4, 1, 128, 2048, 2048), None),
        # 32 key/value heads: the kernel takes 8 at once
        (V6E, "TPU v6", (32, 32, 64, 1024, 512), (32, 8, 64, 512, 1024), (16, 32)),
        # pages larger than any: as many keys
        (V6E, "TPU v6", (8, 1, 1024, 4096, 512), (8, 1, 256, 512, 4096), (2, 32)),
    ],
)
def test_nearest(kind, name, asked, nearest, expected):
    """nearest: the table's entry, by heads, key/value heads, page size, tokens, length."""
    heads, kv_heads, page_size, tokens, length = nearest
    blocks = sizes(kind, *asked)
    entry = TUNED_BLOCK_SIZES[name][("bfloat16", "bfloat16", heads, kv_heads, 128, page_size, tokens, length)]
    assert blocks[0] * asked[2] == entry[0] * page_size
    assert blocks[1] == entry[1]
    assert expected in (None, blocks)


def test_more_heads_than_were_measured():
    """Fewer queries, so that a block is no larger: Llama 70B on four chips, 16 query heads for 2 key/value heads."""
    (_, few), (_, more) = (sizes(V5P, heads, 2, 128, 2048, 2048) for heads in (12, 16))
    assert more <= few * 12 / 16
    assert more & (more - 1) == 0
    assert sizes(V5P, 512, 2, 128, 2048, 2048)[1] >= 1


@pytest.mark.parametrize("other", [{"kind": "TPU v4"}, {"kind": "TPU7x"}, {"dtype": "float32"}, {"head_dim": 256}])
def test_not_measured(other):
    asked = {"kind": V6E, "heads": 32, "kv_heads": 8, "page_size": 64, "length": 4096, "tokens": 1024}
    assert sizes(**asked) != (KEYS // 64, QUERIES)
    assert sizes(**asked | other) == (KEYS // 64, QUERIES)


def test_no_more_than_there_is():
    assert sizes(V6E, 4, 1, 64, 100, 8) == (2, 8)  # pages of a sequence, and tokens
    assert sizes("TPU v4", 4, 1, 1024, 4096, 64)[0] == 1
    assert sizes(V6E, 4, 1, 128, 1024, 1024) == (8, 128)
    assert sizes(V6E, 4, 1, 128, 1024, 1024, decode_only=True) == (8, QUERIES)
