"""How fast a chip can be at best: bytes, operations and reductions of a step, from shapes.

The compiler's own estimates over-count scattered updates, so nothing is taken from them. What a step really takes is
more: this is a bound. Source of the method: Williams, Waterman and Patterson, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

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
    busiest_rows, busiest_experts: of the device that has most of them, how many times what all have on average: rows of
        its experts, and experts that have some. Both are in the figures above.
    cached, attended: bytes of keys and values, and operations between these and queries: of those above, what attention
        over pages takes.
    """

    tokens: int
    chip: Chip
    flops: float
    moved: float
    sent: float
    busiest_rows: float = 1.0
    busiest_experts: float = 1.0
    cached: float = 0.0
    attended: float = 0.0

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
    gathered: int = 1,
) -> Bound:
    """The bound of a step of `tokens` tokens of `rows` sequences, each of `context` tokens then, on `tensor` chips.
    layout: of the cache; where it pads heads, the padding is read and multiplied too. fsdp: of how many parts of the
    weights they have one, and get the rest from others. gathered: how many shards of rows share experts.

    Experts are read that tokens have, if each of these takes any with the same chance; all wait for the device that by
    chance has most to read, or to multiply.

    One token a row is decoding; more is a piece of a prompt. Logits are computed once a row.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    vocab = {name for name, axes in model.axes.items() if axes[0] == "vocab"}  # the embedding, the head
    # Of experts a token is multiplied with some; those that no token of the step has are not read.
    experts = {name: model.abstract[name].shape[0] for name, axes in model.axes.items() if axes[0] == "experts"}
    sizes = {spec.name: math.prod(spec.shape) for spec in model.params.values() if spec.name not in vocab}
    held = {name: math.prod(s.shape) * s.dtype.itemsize for name, s in model.abstract.items()}
    body = sum(size for name, size in sizes.items() if name not in experts)
    body_bytes = sum(count for name, count in held.items() if name not in vocab | experts.keys())
    together, parts = tokens * gathered, tensor * gathered  # tokens of those that share experts, and devices
    taken = read = 0.0
    busiest_rows = busiest_experts = 1.0
    if experts:
        count, top_k = max(experts.values()), config.experts_per_token
        chance, each = 1 - (1 - top_k / count) ** together, -(-count // parts)
        busiest_rows = expected_maximum(together * top_k, 1 / parts, parts) * parts / (together * top_k)
        busiest_experts = expected_maximum(each, chance, parts) * parts / (count * chance)
        taken = sum(sizes[name] for name in sizes if name in experts) * top_k / count * together / parts * busiest_rows
        read = sum(held[name] for name in experts) * chance / parts * busiest_experts
    # An embedding is looked up, not multiplied.
    head_bytes = sum(held[name] for name in vocab & model.head)
    attention = 0.0  # products of queries and keys, and of weights and values
    keys, states = 0.0, 0.0  # bytes of keys and values; of what else is kept
    for group in layout.groups:
        layer, count = layout.of_group(group), layout.readers(group)
        if group.pool is None:
            states += 2 * rows * count * layer.nbytes(1)  # they are read and written
            continue
        kv_heads, head_dim = layer.kept_heads
        heads = kv_heads * (layer.case.queries if layer.case else 0)
        kept = group.window or group.chunk or context
        attention += 2 * count * heads * head_dim * tokens * _seen(context, kept, decodes=tokens == rows)
        keys += rows * count * min(context, kept + tokens // rows - 1) * layer.bytes_per_token
    flops = 2 * ((body * tokens + head * rows + attention) / tensor + taken)
    moved = (body_bytes + head_bytes) / tensor + read + keys + states
    # Two reductions a layer, each of which sends and receives the stream twice, but for the own part; and as much where
    # shards of rows give their tokens to experts and get them back.
    stream = tokens * config.hidden_size * model.dtype.itemsize
    sent = (2 * config.num_layers + 1) * 2 * stream * (tensor - 1) / tensor
    sent += len({name.partition(".experts.")[0] for name in experts}) * 2 * stream * (gathered - 1)
    sent += body_bytes / tensor * (fsdp - 1) / fsdp
    return Bound(tokens, chip, flops, moved, sent, busiest_rows, busiest_experts, keys, 2 * attention / tensor)


def expected_maximum(count: int, chance: float, parts: int) -> float:
    """The largest of so many numbers, on average, each of which says how often what has this chance came in `count`
    times; as if they knew nothing of each other.

    Source: David and Nagaraja, Order Statistics, doi:10.1002/0471722162, 3.1: the sum of 1 - F(x)^parts.
    """
    if parts == 1 or chance >= 1:
        return count * chance
    mean = count * chance
    reach = 12 * math.sqrt(mean * (1 - chance)) + 12  # there is nothing beyond it
    low, high = max(int(mean - reach), 0), min(int(mean + reach) + 1, count)
    values = np.arange(low, high + 1)
    ratios = (count - values[:-1]) / values[1:] * (chance / (1 - chance))  # of each probability to the one before
    logs = np.concatenate([[0.0], np.cumsum(np.log(ratios))])
    weights = np.exp(logs - logs.max())
    below = np.cumsum(weights) / weights.sum()
    return low + float(np.sum(1 - below**parts))


def _seen(context: int, kept: int, decodes: bool) -> float:
    """Keys that a token sees: the last one of `context`, or on average of all."""
    seen = min(context, kept)
    return seen if decodes else (seen * (seen + 1) / 2 + (context - seen) * seen) / context
