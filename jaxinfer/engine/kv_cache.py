"""The host's side of the cache: what pages sequences have of all groups, and what of them others have computed.

A call may be scheduled while earlier ones are on their way: calls run on the device in order, so a page that the next
call does not see into can be used again by that same call.

States of sequences are in slots and not in pages: who goes on from what others have computed needs the pages, and a
copy of the state at their end. Copies are made on the device before the next call, in order: what is copied is what the
calls before have left, and a slot that was copied can be used again by that call.
"""

from __future__ import annotations

import hashlib
import secrets
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxinfer.cache import CacheGroup
from jaxinfer.engine.pages import PageAllocator
from jaxinfer.engine.request import Held, Request
from jaxinfer.engine.snapshots import RecentKeys, Rest, Snapshots
from jaxinfer.errors import ContextLengthError

LONG = 2048  # tokens of a prompt: at these, twice as many, and so on, its state is copied
Copies = list[list[tuple[int, int]]]  # from where to where: pages of each pool, then slots


class Match(NamedTuple):
    """The longest known beginning of a sequence.

    tokens: that somebody can go on from.
    pages: that are known.
    slot: of the state after those tokens; None where there are no states.
    key, rest: what that is known by.
    """

    tokens: int = 0
    pages: int = 0
    slot: int | None = None
    key: bytes = b""
    rest: Rest = ()


@dataclass
class KVCacheManager:
    """What the scheduler asks.

    groups: those that have pages.
    page_counts: of each pool, page 0 among them.
    page_size: tokens a page.
    reach: most tokens of a sequence that a call writes.
    prefix_caching: sequences share what begins alike.
    snapshots: slots for copies of states; None: no layer keeps a state.
    """

    groups: Sequence[CacheGroup]
    page_counts: Sequence[int]
    page_size: int
    reach: int
    prefix_caching: bool = True
    snapshots: range | None = None
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def __post_init__(self) -> None:
        self.pools = tuple(PageAllocator(count) for count in self.page_counts)
        self.prefix_caching &= self.snapshots is None or len(self.snapshots) > 0
        self.states = Snapshots(self.snapshots) if self.snapshots and self.prefix_caching else None
        self._pools = [self.pools[group.pool or 0] for group in self.groups]  # of each group
        self._windowed = [i for i, group in enumerate(self.groups) if group.forgets]
        self._chunked = [group for group in self.groups if group.chunk is not None]
        sizes = self.page_size, self.reach
        self._most = [group.most_pages(2**40, *sizes) if group.forgets else None for group in self.groups]
        self.reset()

    def reset(self) -> None:
        """Takes all pages back, whoever holds them, and forgets what is in them."""
        for pool in self.pools:
            pool.reset()
        if self.states is not None:
            self.states.reset()
        self._recent = RecentKeys()
        self._coming: dict[bytes, Request] = {}  # by the pages before them, states that somebody is about to reach
        self._copies: Copies = [[] for _ in (*self.pools, self.states)]

    @property
    def pages_total(self) -> int:
        return sum(pool.num_pages - 1 for pool in self.pools)

    @property
    def pages_used(self) -> int:
        return self.pages_total - sum(pool.free_count for pool in self.pools)

    def check(self, limit: int) -> None:
        """Raises ValueError if a sequence of up to `limit` tokens could never run, even alone."""
        most = [(group.pool, group.most_pages(limit, self.page_size, self.reach)) for group in self.groups]
        for i, pool in enumerate(self.pools):
            needed = sum(pages for of, pages in most if of == i)
            if needed > pool.num_pages - 1:
                raise ContextLengthError(
                    f"a sequence of up to {limit} tokens needs {needed} pages of the cache, which has "
                    f"{pool.num_pages - 1}; lower max_tokens or raise kv_cache_memory",
                    "max_tokens",
                )

    def allocate(self, request: Request, spare: int, slot: int) -> bool:
        """Gives a waiting request pages for all of its tokens, or as many as it ever holds at once, those first that
        others have computed, and a state to go on from in this slot. Or nothing, if `spare` pages of each group would
        not be left, or if somebody is just about to reach a state from which there is less to be computed."""
        match = self._match(request) if self.prefix_caching else Match()
        known = match.pages * self.page_size
        if self.states is not None and known > match.tokens and request.keys[match.pages - 1] in self._coming:
            return False
        request.pages = [Held() for _ in self.groups]  # a new list each time: whoever has a copy of it tells by it
        self._hold(request, match)
        # What comes after full pages is the sequence's own to write to: those that are not full are copied.
        shared = [pool.find((i, match.key, match.rest)) if match.rest else None for i, pool in enumerate(self._pools)]
        if not self._grow([(request, request.length)], spare):
            self.release(request)
            return False
        request.published, request.computed = match.tokens // self.page_size, match.tokens
        if not request.preemptions:
            request.hits, request.stateless = match.tokens, max(known - match.tokens, 0)
        for group, held, page in zip(self.groups, request.pages, shared, strict=True):
            if page is not None:
                own = held.pages[request.published - held.first]
                self._copies[group.pool or 0].append((page, own))
        if self.states is not None:
            if match.slot is not None:
                self.states.use(match.slot)
                self._copies[-1].append((match.slot, slot))
            self._plan(request, known)
        return True

    def reserve(self, rows: Iterable[tuple[Request, int]]) -> bool:
        """Lets go of what fell out of windows, and extends pages to hold so many tokens of each; False, and nothing
        taken, if too few are free."""
        rows = [(request, tokens) for request, tokens in rows if tokens > request.capacity]
        for group in self._windowed:
            for request, _ in rows:
                held, first = request.pages[group], self.groups[group].first_page(request.computed, self.page_size)
                if first > held.first:
                    self._pools[group].release(held.pages[: first - held.first])
                    del held.pages[: first - held.first]
                    held.first = first
        return self._grow(rows)

    def room(self, position: int) -> int:
        """Most tokens of a sequence from this position on that one call may write."""
        return min((group.room(position) for group in self._chunked), default=sys.maxsize)

    def publish(self, request: Request, computed: int) -> None:
        """Lets others find the full pages among the first `computed` tokens, as far as they are still held."""
        if not self.prefix_caching:
            return
        if len(request.tokens) // self.page_size > len(request.keys):
            self._extend_keys(request)
        for page in range(request.published, min(computed // self.page_size, len(request.keys))):
            for i, (pool, held) in enumerate(zip(self._pools, request.pages, strict=True)):
                if 0 <= page - held.first < len(held.pages):
                    pool.publish(held.pages[page - held.first], (i, request.keys[page]))
            if not self.groups:
                self._recent.add(request.keys[page])
            request.published = page + 1

    def keep(self, request: Request, count: int) -> None:
        """Lets others go on from a running request's state: that has seen `count` of its tokens when all scheduled
        calls are done. Where that is in the middle of a page, the page is known, too."""
        if self.states is None:
            return
        self.publish(request, count)
        page, more = divmod(count, self.page_size)
        key, rest = self._key(request, page), tuple(request.tokens[count - more : count])
        if rest:
            for i, (pool, held) in enumerate(zip(self._pools, request.pages, strict=True)):
                pool.publish(held.pages[page - held.first], (i, key, rest))
        if (slot := self.states.put(key, rest)) is not None:
            self._copies[-1].append((request.slot, slot))

    def reach_cut(self, request: Request) -> None:
        """After a chunk of its prompt was scheduled: keeps the state, if it was to end there."""
        if request.cuts and request.computed == request.cuts[0]:
            self._drop(request, request.cuts.pop(0))
            self.keep(request, request.computed)

    def take_copies(self) -> Copies:
        """What is to be copied before the call that was just scheduled."""
        copies, self._copies = self._copies, [[] for _ in self._copies]
        return copies

    def release(self, request: Request) -> None:
        """Gives a request's pages back."""
        for pool, held in zip(self._pools, request.pages, strict=True):
            pool.release(held.pages)
        for cut in request.cuts:
            self._drop(request, cut)
        request.pages, request.capacity, request.cuts = [], 0, []

    def _plan(self, request: Request, known: int) -> None:
        """Where chunks of a prompt end, as its state is wanted there: at the end of the pages that others have, too, at
        its own end in whole pages, and now and then, so that who shares some of it computes at most about half of that
        again."""
        end = request.first_logits if request.target is not None else request.length - 1
        doubled = [LONG << i for i in range((end // LONG).bit_length())]
        places = {place // self.page_size * self.page_size for place in (known, end, *doubled) if place <= end}
        request.cuts = sorted(place for place in places if place > request.computed)
        for cut in request.cuts:
            self._coming.setdefault(self._key(request, cut // self.page_size), request)

    def _drop(self, request: Request, cut: int) -> None:
        """Nobody waits any longer for a state that was to come."""
        key = self._key(request, cut // self.page_size)
        if self._coming.get(key) is request:
            del self._coming[key]

    def _grow(self, rows: Sequence[tuple[Request, int]], spare: int = 0) -> bool:
        missing: list[tuple[PageAllocator, Held, int]] = []
        for request, tokens in rows:
            pages = -(-tokens // self.page_size)  # of which a group with a window holds so many at once
            for pool, held, most in zip(self._pools, request.pages, self._most, strict=True):
                count = (pages if most is None else min(pages, held.first + most)) - held.first - len(held.pages)
                if count > 0:
                    missing.append((pool, held, count))
        for of in self.pools if missing or spare else ():
            left = spare * len(rows) * self._pools.count(of)
            if sum(count for pool, _, count in missing if pool is of) + left > of.free_count:
                return False
        for pool, held, count in missing:
            held.pages += pool.take(count)
        if not self._windowed:  # pages that fall out of windows are given back at each call
            for request, _ in rows:
                request.capacity = len(request.pages[0].pages) * self.page_size if request.pages else 0
        return True

    def _match(self, request: Request) -> Match:
        """The longest known beginning. Groups that see everything need all of its pages, those with a window what is
        seen from its end, those with slots a state."""
        self._extend_keys(request)
        keys = request.keys[: request.first_logits // self.page_size]
        runs, match = [0] * len(self.groups), Match()  # of each group, known pages in a row up to here
        for page in range(len(keys) + 1):
            key = self._key(request, page)
            if page:
                for i, pool in enumerate(self._pools):
                    runs[i] = runs[i] + 1 if pool.find((i, key)) is not None else 0
                if not self.groups and key not in self._recent:
                    break
                if all(run >= self._wanted(group, page) for run, group in zip(runs, self.groups, strict=True)):
                    match = match._replace(pages=page)
                    if self.states is None:
                        match = match._replace(tokens=page * self.page_size)
                elif any(not group.forgets and not run for run, group in zip(runs, self.groups, strict=True)):
                    break
            if self.states is not None:
                for rest, slot in self.states.after(key).items():
                    end = page * self.page_size + len(rest)
                    if end > match.tokens and self._follows(request, page, key, rest, runs):
                        match = Match(end, match.pages, slot, key, rest)
        return match

    def _follows(self, request: Request, page: int, key: bytes, rest: Rest, runs: Sequence[int]) -> bool:
        """Whether a request can go on from the state after so many pages and the rest."""
        start, end = page * self.page_size, page * self.page_size + len(rest)
        return (
            end <= request.first_logits
            and tuple(request.tokens[start:end]) == rest
            and all(
                run >= page - group.first_page(end, self.page_size)
                and (not rest or self._pools[i].find((i, key, rest)) is not None)
                for i, (run, group) in enumerate(zip(runs, self.groups, strict=True))
            )
        )

    def _hold(self, request: Request, match: Match) -> None:
        """Takes the known pages for a request. Those that are to be copied are only used."""
        full = match.tokens // self.page_size
        for i, (group, pool, held) in enumerate(zip(self.groups, self._pools, request.pages, strict=True)):
            held.first = group.first_page(match.tokens, self.page_size)
            pages = [pool.find((i, key)) for key in request.keys[held.first : full]]
            pages += [pool.find((i, match.key, match.rest))] if match.rest else []
            for page in pages:
                assert page is not None
                pool.hold(page)
                held.pages.append(page)
            if match.rest:
                pool.release([held.pages.pop()])
        if not self.groups:
            for key in request.keys[: match.pages]:
                self._recent.add(key)

    def _wanted(self, group: CacheGroup, end: int) -> int:
        """How many of the pages before this one must be known: those seen from its first token, and at least one."""
        return max(end - group.first_page(end * self.page_size, self.page_size), 1)

    def _key(self, request: Request, pages: int) -> bytes:
        """Of the first so many pages."""
        if pages:
            return request.keys[pages - 1]
        salt = request.cache_salt.encode(errors="surrogatepass")
        if request.adapter is not None:  # by its content: another one of the same name finds nothing of this one
            salt = request.adapter.digest + salt
        return self._digest(salt) if salt else b""

    def _extend_keys(self, request: Request) -> None:
        """Brings the keys of a request up to date: one for each full page of its tokens, which may only have grown."""
        keys, tokens, size = request.keys, request.tokens, self.page_size
        for page in range(len(keys), len(tokens) // size):
            content = np.asarray(tokens[page * size : (page + 1) * size], np.int32).tobytes()
            keys.append(self._digest(self._key(request, page) + content))

    def _digest(self, content: bytes) -> bytes:
        # Nobody who chooses prompts can make two different prefixes share a key without knowing the secret.
        return hashlib.blake2b(content, digest_size=16, key=self._secret).digest()
