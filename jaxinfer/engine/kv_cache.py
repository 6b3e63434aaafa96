"""The host's side of the cache: what pages sequences have of all groups, and what of them others have computed.

A call may be scheduled while earlier ones are on their way: calls run on the device in order, so a page that the next
call does not see into can be used again by that same call.
"""

from __future__ import annotations

import hashlib
import secrets
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxinfer.cache import CacheGroup
from jaxinfer.engine.pages import PageAllocator
from jaxinfer.engine.request import Held, Request
from jaxinfer.errors import ContextLengthError


@dataclass
class KVCacheManager:
    """What the scheduler asks.

    groups: those that have pages.
    page_counts: of each pool, page 0 among them.
    page_size: tokens a page.
    reach: most tokens of a sequence that a call writes.
    prefix_caching: sequences share what begins alike.
    whole: there are no groups of other kinds beside. With such there are no hits: what those keep is not there at the
        end of a page.
    """

    groups: Sequence[CacheGroup]
    page_counts: Sequence[int]
    page_size: int
    reach: int
    prefix_caching: bool = True
    whole: bool = True
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def __post_init__(self) -> None:
        self.pools = tuple(PageAllocator(count) for count in self.page_counts)
        self.prefix_caching &= self.whole
        self._pools = [self.pools[group.pool or 0] for group in self.groups]  # of each group
        self._windowed = [i for i, group in enumerate(self.groups) if group.forgets]
        self._chunked = [group for group in self.groups if group.chunk is not None]
        sizes = self.page_size, self.reach
        self._most = [group.most_pages(2**40, *sizes) if group.forgets else None for group in self.groups]

    def reset(self) -> None:
        """Takes all pages back, whoever holds them, and forgets what is in them."""
        for pool in self.pools:
            pool.reset()

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

    def allocate(self, request: Request, spare: int) -> bool:
        """Gives a waiting request pages for all of its tokens, or as many as it ever holds at once, those first that
        others have computed; or nothing, if `spare` pages of each group would not be left."""
        request.pages = [Held() for _ in self.groups]  # a new list each time: whoever has a copy of it tells by it
        matched = self._match(request) if self.prefix_caching else 0
        if not self._grow([(request, request.length)], spare):
            self.release(request)
            return False
        request.published, request.computed = matched, matched * self.page_size
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
            request.published = page + 1

    def release(self, request: Request) -> None:
        """Gives a request's pages back."""
        for pool, held in zip(self._pools, request.pages, strict=True):
            pool.release(held.pages)
        request.pages, request.capacity = [], 0

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

    def _match(self, request: Request) -> int:
        """Takes the pages of the longest known beginning; how many pages long it is. Groups that see everything need
        all of them, those with a window what is seen from its end."""
        self._extend_keys(request)
        keys = request.keys[: request.first_logits // self.page_size]
        runs, length = [0] * len(self.groups), 0  # of each group, known pages in a row up to here
        for page, key in enumerate(keys):
            for i, pool in enumerate(self._pools):
                runs[i] = runs[i] + 1 if pool.find((i, key)) is not None else 0
            if all(run >= self._wanted(group, page + 1) for run, group in zip(runs, self.groups, strict=True)):
                length = page + 1
            elif any(not group.forgets and not run for run, group in zip(runs, self.groups, strict=True)):
                break
        for i, (group, held) in enumerate(zip(self.groups, request.pages, strict=True)):
            held.first = group.first_page(length * self.page_size, self.page_size)
            for key in keys[held.first : length]:
                known = self._pools[i].find((i, key))
                assert known is not None
                self._pools[i].hold(known)
                held.pages.append(known)
        return length

    def _wanted(self, group: CacheGroup, end: int) -> int:
        """How many of the pages before this one must be known: those seen from its first token, and at least one."""
        return max(end - group.first_page(end * self.page_size, self.page_size), 1)

    def _extend_keys(self, request: Request) -> None:
        """Brings the keys of a request up to date: one for each full page of its tokens, which may only have grown."""
        keys, tokens, size = request.keys, request.tokens, self.page_size
        salt = request.cache_salt.encode(errors="surrogatepass")
        if request.adapter is not None:  # by its content: another one of the same name finds nothing of this one
            salt = request.adapter.digest + salt
        start = self._digest(salt) if salt else b""
        for page in range(len(keys), len(tokens) // size):
            content = np.asarray(tokens[page * size : (page + 1) * size], np.int32).tobytes()
            keys.append(self._digest((keys[-1] if keys else start) + content))

    def _digest(self, content: bytes) -> bytes:
        # Nobody who chooses prompts can make two different prefixes share a key without knowing the secret.
        return hashlib.blake2b(content, digest_size=16, key=self._secret).digest()
