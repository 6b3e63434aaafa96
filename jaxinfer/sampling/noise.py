"""Random numbers that are a function of seed and place, the same on every device and however work is split."""

from __future__ import annotations

import jax
import jax.numpy as jnp

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def threefry(key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011), all u32. JAX's own is a loop on CPU, and many things to
    compile; here it is element by element, for whatever uses it to have it in one pass."""
    keys = *key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA)
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(5):
        for rotation in ROTATIONS[i % 2]:
            a += b
            b = (b << jnp.uint32(rotation) | b >> jnp.uint32(32 - rotation)) ^ a
        a += keys[(i + 1) % 3]
        b += keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return a, b


def gumbel(seed: jax.Array, length: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise f32[R, vocab], a function of the row's seed u32[R, 2], its length i32[R] and the token."""
    tokens, place = jnp.arange(vocab, dtype=jnp.uint32), length.astype(jnp.uint32)[:, None]
    bits, _ = threefry((seed[:, 0, None], seed[:, 1, None]), (tokens, place))
    # In the middle of one of 2**23 pieces of (0, 1), which float32 has exactly: never 0, never 1.
    uniform = ((bits >> jnp.uint32(9)).astype(jnp.float32) + 0.5) * jnp.float32(2**-23)
    return -jnp.log(-jnp.log(uniform))
