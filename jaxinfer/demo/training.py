"""What the scripts that train the packaged models share. Needs optax (`pip install '.[train]'`).

The matrices learn with Muon (Jordan, 2024, https://kellerjordan.github.io/posts/muon/), which here gets as far as
Adam does in several times as many steps; norms and the embedding learn with Adam.
"""

from __future__ import annotations

import itertools
import json
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import ml_dtypes
import numpy as np

from jaxinfer.models.model import AbstractModel, Params

T = TypeVar("T")

LEARNING_RATE = 0.01
WARM_UP = 200


def optimize(
    model: AbstractModel, loss: Callable[..., jax.Array], data: Iterator[tuple[Any, ...]], steps: int, seed: int
) -> Params:
    """The parameters after `steps` steps on `data`, each the arguments of `loss` after the parameters; prints how it
    goes to stderr."""
    import optax
    from optax.contrib import MuonDimensionNumbers, muon

    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(WARM_UP, steps // 2), steps, 0.0)
    # Weights are [out, in]. The embedding is a table and not a product's matrix: Adam's, as are the norms.
    by_muon = {
        name: MuonDimensionNumbers(reduction_axis=1, output_axis=0)
        if len(shape.shape) == 2 and "embed" not in name
        else None
        for name, shape in model.abstract.items()
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), muon(schedule, weight_decay=0.05, muon_weight_dimension_numbers=by_muon)
    )

    def step(params: Params, state: Any, *data: Any) -> tuple[Params, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, *data)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    # optax mixes dtypes in its schedules: standard promotion, whatever the caller has set.
    with jax.numpy_dtype_promotion("standard"):
        params = model.random_params(seed)
        state = jax.jit(optimizer.init)(params)
        compiled = jax.jit(step, donate_argnums=(0, 1))
        began, losses = time.monotonic(), []
        for done, own in enumerate(itertools.islice(_ahead(data), steps), 1):
            params, state, value = compiled(params, state, *own)
            losses.append(value)
            if done % 100 == 0 or done == steps:
                mean = float(np.mean(jax.device_get(losses)))
                left = (time.monotonic() - began) / done * (steps - done)
                print(f"step {done} of {steps}: loss {mean:.4f}, {left:.0f} s left", file=sys.stderr, flush=True)
                losses = []
    return params


def _ahead(items: Iterator[T], size: int = 8) -> Iterator[T]:
    """The same items, made by a thread while the device is busy."""
    made: queue.Queue[T] = queue.Queue(size)

    def make() -> None:
        for item in items:
            made.put(item)

    threading.Thread(target=make, daemon=True).start()
    while True:
        yield made.get()


def save(folder: Path, params: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Writes a model in Hugging Face's format, bfloat16: all of it or, if that fails, nothing.

    params: by their names in checkpoints. files: what else there is, by name; what is neither bytes nor text is JSON.
    """
    from safetensors.numpy import save as serialize

    tensors = {name: np.asarray(value).astype(ml_dtypes.bfloat16) for name, value in params.items()}
    files = {"model.safetensors": serialize(tensors, metadata={"format": "pt"}), **files}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        inside = Path(temporary) / folder.name
        inside.mkdir()
        for name, content in files.items():
            (inside / name).parent.mkdir(exist_ok=True)
            _write(inside / name, content)
        inside.rename(folder)


def _write(path: Path, content: Any) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
