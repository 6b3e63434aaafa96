"""How fast a chip can be at best: bytes, operations and reductions of a step, from shapes.

The compiler's own estimates over-count scattered updates, so nothing is taken from them. What a step really takes is
more: this is a bound. Source of the method: Williams, Waterman and Patterson, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxinfer.attention import CacheLayout
from jaxinfer.models.model import AbstractModel
from jaxinfer.plan.slices import Chip


@dataclass(frozen=True)
class Bound:
    """What a step takes of each chip, and the seconds that it takes at least.

    tokens: of the step.
    chip: which is each.
    flops: operations.
    moved: bytes of memory that move.
    sent: bytes on its links.
    """

    tokens: int
    chip: Chip
    flops: float
    moved: float
    sent: float

    @property
    def compute(self) -> float:
        return self.flops / self.chip.flops

    @property
    def memory(self) -> float:
        return self.moved / self.chip.bandwidth

    @property
    def links(self) -> float:
        return self.sent / self.chip.link

    @property
    def seconds(self) -> float:
        """They overlap at best: the slowest one binds."""
        return max(self.compute, self.memory, self.links)

    @property
    def binds(self) -> str:
        names = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return max(names, key=lambda name: names[name])

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def bound(
    model: AbstractModel,
    chip: Chip,
    layout: CacheLayout,
    tensor: int,
    tokens: int,
    context: int,
    rows: int,
    fsdp: int = 1,
) -> Bound:
    """The bound of a step of `tokens` tokens of `rows` sequences, each of `context` tokens then, on `tensor` chips.
    layout: of the cache; where it pads heads, the padding is read and multiplied too. fsdp: of how many parts of the
    weights they have one, and get the rest from others.

    Experts are read that tokens have, if each of these takes any with the same chance.

    One token a row is decoding; more is a piece of a prompt. Logits are computed once a row.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    vocab = {name for name, axes in model.axes.items() if axes[0] == "vocab"}  # the embedding, the head
    # Of experts a token is multiplied with some; those that no token of the step has are not read.
    experts = {name: model.abstract[name].shape[0] for name, axes in model.axes.items() if axes[0] == "experts"}
    taken = {name: config.experts_per_token / count for name, count in experts.items()}
    body = sum(
        math.prod(spec.shape) * taken.get(spec.name, 1) for spec in model.params.values() if spec.name not in vocab
    )
    held = {name: math.prod(s.shape) * s.dtype.itemsize for name, s in model.abstract.items()}
    body_bytes = sum(count for name, count in held.items() if name not in vocab)
    read = sum(count * (1 - (1 - taken.get(name, 1)) ** tokens) for name, count in held.items() if name not in vocab)
    # An embedding is looked up, not multiplied.
    head_bytes = sum(held[name] for name in vocab & model.head)
    attention, keys = 0.0, 0.0  # products of queries and keys, and of weights and values; bytes of keys and values
    for group in layout.groups:
        layer, count = layout.of_group(group), layout.readers(group)
        if group.pool is None:
            keys += rows * count * layer.nbytes(1)
            continue
        kv_heads, head_dim = layer.kept_heads
        heads = kv_heads * (layer.case.queries if layer.case else 0)
        kept = group.window or group.chunk or context
        attention += 2 * count * heads * head_dim * tokens * _seen(context, kept, decodes=tokens == rows)
        keys += rows * count * min(context, kept + tokens // rows - 1) * layer.nbytes(1)
    flops = 2 * (body * tokens + head * rows + attention)
    moved = (read + head_bytes) / tensor + keys
    # Two reductions a layer, each of which sends and receives the stream twice, but for the own part.
    stream = tokens * config.hidden_size * model.dtype.itemsize
    sent = (2 * config.num_layers + 1) * 2 * stream * (tensor - 1) / tensor
    sent += body_bytes / tensor * (fsdp - 1) / fsdp
    return Bound(tokens, chip, flops / tensor, moved, sent)


def _seen(context: int, kept: int, decodes: bool) -> float:
    """Keys that a token sees: the last one of `context`, or on average of all."""
    seen = min(context, kept)
    return seen if decodes else (seen * (seen + 1) / 2 + (context - seen) * seen) / context
