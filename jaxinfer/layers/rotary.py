"""Rotary position embeddings (Su et al., arXiv:2104.09864) and the ways checkpoints stretch them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True)
class Rope:
    """Frequencies of the rotation.

    KINDS: ways to stretch them that any family may have.

    dim: how many of a head's dimensions turn, the first ones: even; half as many frequencies.
    theta: base of the periods.
    kind: how checkpoints stretch them:
        default  not at all.
        linear   positions divided by `factor`.
        dynamic  not up to the trained context (beyond it the result would depend on how a prompt is cut: refused).
        llama3   low frequencies divided by `factor`, high ones kept, a ramp in between (Llama 3.1).
        yarn     a ramp over dimensions, and cos and sin scaled by `attention_factor` (arXiv:2309.00071).
        longrope  each frequency divided by its own factor, cos and sin scaled likewise (arXiv:2402.13753).
        proportional  divided by `factor`, and 0 but for the first `turning / 2` (Gemma 4, whose family alone has it).
    factor: see kind.
    turning: proportional: how many of the dimensions turn, half of them from the middle on.
    original_context: llama3, yarn: positions of the pretraining.
    low_freq_factor, high_freq_factor: llama3: where the ramp ends, in turns within the original context; where both are
        equal it is a step.
    beta_fast, beta_slow: yarn: the same.
    truncate: yarn: whole dimensions as the ramp's ends.
    attention_factor: yarn, longrope: scales cos and sin.
    long_attention_factor: longrope: the same where `long_factors` are in use; None: it is that one.
    short_factors, long_factors: longrope: those of contexts up to the original one, and of longer ones.
    long_context: longrope: positions that `long_factors` are for; 0: there are none.
    long: longrope: they are in use.
    interleaved: dimension 2i turns with 2i + 1 (GPT-J's layout), not i with i + dim/2 (GPT-NeoX's).
    """

    KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    long_attention_factor: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    long_context: int = 0
    long: bool = False
    turning: int = 0
    interleaved: bool = False

    def inv_freq(self) -> np.ndarray:
        """Radians a position, float32 `[dim / 2]`."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        periods = np.float32(self.theta) ** exponents
        if self.kind == "longrope":
            periods = periods * np.asarray(self.long_factors if self.long else self.short_factors, np.float32)
        base = np.float32(1) / periods
        if self.kind in ("default", "dynamic", "longrope"):
            return base
        factor = np.float32(self.factor)
        if self.kind == "linear":
            return base / factor
        if self.kind == "proportional":
            return np.where(np.arange(self.dim // 2) < self.turning // 2, base, np.float32(0)) / factor
        if self.kind == "llama3":
            return self._llama3(base, factor)
        return self._yarn(base, factor)

    def _llama3(self, base: np.ndarray, factor: np.float32) -> np.ndarray:
        # How many times each frequency turns within the pretraining context decides what happens to it.
        turns = np.float32(self.original_context) * base / np.float32(2 * math.pi)
        low, high = np.float32(self.low_freq_factor), np.float32(self.high_freq_factor)
        ramp = (turns - low) / (high - low) if high > low else turns >= low
        keep = np.clip(ramp, 0, 1, dtype=np.float32)
        return (1 - keep) * base / factor + keep * base

    def _yarn(self, base: np.ndarray, factor: np.float32) -> np.ndarray:
        def dimension(turns: float) -> float:
            """The dimension that turns this many times within the pretraining context."""
            period = self.original_context / (turns * 2 * math.pi)
            return self.dim * math.log(period) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        index = np.arange(self.dim // 2, dtype=np.float32)
        stretch = np.clip((index - np.float32(low)) / np.float32(high - low), np.float32(0), np.float32(1))
        return stretch * base / factor + (1 - stretch) * base

    def cos_sin(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """cos and sin of each token's angles, float32 `[T, dim / 2]`."""
        factor = self.long_attention_factor if self.long else None
        scale = np.float32(self.attention_factor if factor is None else factor)

        def turned(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
            angles = positions.astype(jnp.float32)[:, None] * self.inv_freq()[None, :]
            return jnp.cos(angles) * scale, jnp.sin(angles) * scale

        def unturned(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
            shape = len(positions), self.dim // 2
            return jnp.full(shape, scale), jnp.zeros(shape, jnp.float32)

        # Once for all layers: XLA fuses it into what each of them rotates, and on CPU all but what a branch gives.
        return lax.platform_dependent(
            positions,
            cpu=lambda p: lax.cond(jnp.any(p != 0), turned, unturned, p),
            default=lambda p: lax.optimization_barrier(turned(p)),
        )

    def rotate(self, x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Rotates `x [T, heads, d]` by what `cos_sin` gives, in float32; dimensions from `dim` on stay."""
        cos, sin = (a[:, None, :] for a in cos_sin)
        turned, rest = x[..., : self.dim].astype(jnp.float32), x[..., self.dim :]
        if self.interleaved:
            pairs = turned.reshape(*turned.shape[:-1], -1, 2)
            first, second = pairs[..., 0], pairs[..., 1]
        else:
            first, second = jnp.split(turned, 2, axis=-1)
        both = first * cos - second * sin, second * cos + first * sin
        turned = jnp.stack(both, axis=-1).reshape(turned.shape) if self.interleaved else jnp.concatenate(both, axis=-1)
        return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
