"""One request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from jaxinfer.engine.exclusions import Exclusions
from jaxinfer.engine.guided.guide import Guide
from jaxinfer.engine.guided.tables import MOST
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.sampling.table_sizes import COMPLETE, FORCED

if TYPE_CHECKING:  # who shows outputs imports no JAX
    from jaxinfer.checkpoint.factors import LoadedAdapter

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Held:
    """A sequence's pages in one group.

    pages: in the sequence's order.
    first: which of its pages, counted from its beginning, the first of them is; those before have fallen out of the
        group's window.
    """

    pages: list[int] = field(default_factory=list)
    first: int = 0


@dataclass(eq=False, slots=True)
class Request:
    """The state of one sequence, in integers: nothing here knows of a device. Calls are scheduled before the tokens of
    the call before have arrived.

    id: the engine's number; of those of one priority the lowest runs first.
    prompt_length: tokens of the prompt.
    tokens: of prompt and output together, as far as the host knows them.
    params: as the user wants it sampled.
    seed: its own.
    stop_ids: end it.
    limit: most tokens that it may reach.
    priority: lower runs earlier.
    cache_salt: pages are shared by those of one salt.
    adapter: its own, or none; pages are shared by those of one. adapter_name: as it was asked for. adapter_slot: where
        it is on the devices; -1: nowhere.
    scored_from: the first of the given tokens whose log-probability is wanted, if any is.
    target: the token after the last one, where only log-probabilities are wanted; such a request samples nothing.
    exclusions: tokens that may not come; None if there are none.
    guide: its place in its grammar; None if it has none.
    table: the blocks of its grammar's table on the devices; None where it has none, or goes by masks.
    length: tokens, those that are on their way too.
    computed: how many tokens will have their keys and values in the cache when all scheduled calls are done.
    decoding: its last token is in its slot on the device.
    shard: of the rows: where its slot and its pages are.
    slot: its place in the device's arrays; -1 while it waits.
    prepared: its slot has been made ready for its penalties and masks.
    pages: of each group that has pages, while it runs.
    capacity: tokens that they have room for without asking; 0 where that is not so simple.
    keys: of its full pages.
    published: how many of its pages others can find.
    cuts: where its prompt's chunks are to end, as the state there is to be kept: of how many tokens each.
    hits: tokens that the prefix cache had.
    stateless: how many more there were pages of, but no state to go on from.
    finish_reason: None while it waits or runs.
    preemptions: how often it gave its pages back.
    """

    id: int
    prompt_length: int
    tokens: list[int]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    limit: int
    priority: int = 0
    cache_salt: str = ""
    adapter: LoadedAdapter | None = None
    adapter_name: str = ""
    adapter_slot: int = -1
    scored_from: int | None = None
    target: int | None = None
    exclusions: Exclusions | None = None
    guide: Guide | None = None
    table: list[int] | None = None
    length: int = 0
    computed: int = 0
    decoding: bool = False
    shard: int = 0
    slot: int = -1
    prepared: bool = False
    pages: list[Held] = field(default_factory=list)
    capacity: int = 0
    keys: list[bytes] = field(default_factory=list)
    published: int = 0
    cuts: list[int] = field(default_factory=list)
    hits: int = 0
    stateless: int = 0
    finish_reason: FinishReason | None = None
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.length = len(self.tokens)

    @property
    def constrained(self) -> bool:
        """Whether the host has to say what may come next, as that depends on all tokens so far."""
        by_masks = self.guide is not None and self.table is None
        return by_masks or (self.exclusions is not None and self.exclusions.follows)

    @property
    def table_end(self) -> int:
        """From which one on ends of its table end it on the device; 0 where it has none. Where the device need not see
        each token, those that come without a choice are left to the host."""
        if self.table is None:
            return 0
        params = self.params
        return COMPLETE if params.logprobs is not None or params.has_penalties or params.has_masks else FORCED

    @property
    def tail(self) -> list[int]:
        """The tokens that are left, where the device has ended it before them."""
        if self.table_end != FORCED:
            return []
        assert self.guide is not None
        assert self.guide.table is not None
        return self.guide.table.tails.get(self.guide.state, [])

    @property
    def room(self) -> int:
        """How many more tokens may be sampled."""
        return self.limit - self.length

    @property
    def most_left(self) -> int:
        """How many more tokens the device may sample for it, as far as its grammar says that."""
        if self.table_end != FORCED:
            return self.room
        assert self.guide is not None
        assert self.guide.table is not None
        longest, on_their_way = int(self.guide.table.longest[self.guide.state]), self.length - len(self.tokens)
        return self.room if longest == MOST else min(self.room, max(longest - on_their_way, 1))

    @property
    def first_logits(self) -> int:
        """The first token whose logits are wanted: at the latest the last one. Those before it need not be computed."""
        return self.length - 1 if self.scored_from is None else self.scored_from - 1

    def scored_tokens(self, first: int, end: int) -> list[int]:
        """Those of the given tokens from `first` to before `end`."""
        tokens = self.tokens[first : min(end, self.prompt_length)]
        return [*tokens, self.target] if self.target is not None and end > self.prompt_length else tokens

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.tokens[: self.prompt_length]

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.prompt_length :]
