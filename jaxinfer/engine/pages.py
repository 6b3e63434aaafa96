"""The host's side of the cache: who holds which page, and which pages can be used again.

A page that is full is known by a key of all tokens up to its end, so that a sequence with the same beginning can share
it. Pages are counted by reference; one that nobody holds keeps its content until it is needed, oldest first.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class PageAllocator:
    """Hands out page ids 1 .. num_pages-1. Page 0 takes what padding tokens write and is never handed out."""

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True):
        if num_pages < 2:
            raise ValueError(f"num_pages is {num_pages}: it must be at least 2, as page 0 is reserved")
        self.page_size = page_size
        self.num_pages = num_pages
        self.prefix_caching = prefix_caching
        # Nobody who chooses prompts can make two different prefixes share a key without knowing this.
        self._secret = secrets.token_bytes(32)
        self.reset()

    def reset(self) -> None:
        """Takes all pages back, whoever holds them, and forgets what is in them."""
        self._references = [0] * self.num_pages
        self._blank = list(range(self.num_pages - 1, 0, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()  # known content, nobody's: least recently used first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free_count(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + len(self._unused)

    def pages_for(self, tokens: int) -> int:
        """How many pages hold this many tokens."""
        return -(-tokens // self.page_size)

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int], cache_salt: str = "") -> None:
        """Brings the keys of a sequence up to date: one for each full page of `tokens`, which may only have grown.
        cache_salt: all that keys and values depend on, or are kept apart by, besides tokens."""
        if not self.prefix_caching:
            return
        start = self._digest(cache_salt.encode(errors="surrogatepass")) if cache_salt else b""
        for page in range(len(keys), len(tokens) // self.page_size):
            content = np.asarray(tokens[page * self.page_size : (page + 1) * self.page_size], np.int32).tobytes()
            keys.append(self._digest((keys[-1] if keys else start) + content))

    def _digest(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=16, key=self._secret).digest()

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Takes the pages that hold the longest known beginning of `keys`."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._take(page)
            pages.append(page)
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Lets others find a full page. Of two pages with the same content, the first one is found."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def grow(self, pages: list[int], tokens: int) -> bool:
        """Extends a sequence's pages to hold `tokens`; False, and nothing taken, if too few are free."""
        missing = self.pages_for(tokens) - len(pages)
        if missing > self.free_count:
            return False
        for _ in range(missing):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._unused.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._references[page] = 1
            pages.append(page)
        return True

    def release(self, pages: list[int]) -> None:
        """Gives a sequence's pages back and empties the list. Its last pages are used again before its first ones."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._unused[page] = None
                else:
                    self._blank.append(page)
        pages.clear()

    def _take(self, page: int) -> None:
        if self._references[page] == 0:
            del self._unused[page]
        self._references[page] += 1
