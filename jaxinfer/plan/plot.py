"""Pictures; above all a plan's bounds: tokens a second a chip over the batch (pip install '.[plot]')."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.output import unused, whole
from jaxinfer.places import check_new, local

BOUNDS = {"compute": "arithmetic", "memory": "memory", "links": "links between chips"}


def check_plot(path: str) -> None:
    """Raises ValueError if no picture could be written there, which is tried."""
    file = Path(local(path, "--plot"))
    if file.suffix.lower() != ".png" or file.is_dir():
        raise ValueError(f"--plot {path}: it must be the name of a .png file")
    if not file.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {Path(path).parent}")
    check_new(unused(str(file)) if os.path.lexists(file) else str(file), f"--plot {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install '.[plot]'") from None


def draw(content: Callable[[Any], None], path: str) -> None:
    """Draws `content` on the axes of a PNG file, which is there as a whole or not at all."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8, 5), layout="constrained")
    content(picture.subplots())
    with whole(local(path, "--plot")) as temporary:
        picture.savefig(temporary, format="png", dpi=120)


def plot(figures: dict[str, Any], path: str) -> None:
    """Draws the figures of a plan into a PNG file."""
    draw(lambda axes: _bounds(figures, axes), path)


def _bounds(figures: dict[str, Any], axes: Any) -> None:
    rows = [step["rows"] for step in figures["decode"]]
    for name, label in BOUNDS.items():
        share = figures["devices_per_chip"] / figures["devices"]
        seconds = [step[f"{name}_seconds"] for step in figures["decode"]]
        if all(seconds):
            rates = [count / s * share for count, s in zip(rows, seconds, strict=True)]
            axes.plot(rows, rates, "--", label=f"if {label} were all")
    axes.plot(rows, [step["tokens_per_second_per_chip"] for step in figures["decode"]], "k-", lw=2, label="at best")
    room = figures["rows_of_context"]
    if room < rows[-1]:
        axes.axvline(max(room, 1), color="grey", ls=":", label=f"the cache holds {room} sequences")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"sequences that decode at once, of {figures['context']:,} tokens each",
        ylabel="tokens a second a chip, at most",
        title=f"{figures['topology']}, {figures['mesh']}, {figures['dtype']}",
        xticks=rows,
    )
    axes.set_xticks(rows, [str(count) for count in rows])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
