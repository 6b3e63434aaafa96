"""Page ids of one pool: who holds which, and which can be used again.

A page that is full is known by a key of all tokens up to its end, so that a sequence with the same beginning can share
it. Pages are counted by reference; one that nobody holds keeps its content until it is needed, oldest first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence


class PageAllocator:
    """Hands out page ids 1 .. num_pages-1. Page 0 takes what padding tokens write and is never handed out."""

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"num_pages is {num_pages}: it must be at least 2, as page 0 is reserved")
        self.num_pages = num_pages
        self.reset()

    def reset(self) -> None:
        """Takes all pages back, whoever holds them, and forgets what is in them."""
        self._references = [0] * self.num_pages
        self._blank = list(range(self.num_pages - 1, 0, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()  # known content, nobody's: least recently used first
        self._page_of: dict[Hashable, int] = {}
        self._key_of: dict[int, Hashable] = {}

    @property
    def free_count(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + len(self._unused)

    def find(self, key: Hashable) -> int | None:
        """The page that was published under this key, if it is still there."""
        return self._page_of.get(key)

    def hold(self, page: int) -> None:
        """Takes a page that was found."""
        if self._references[page] == 0:
            del self._unused[page]
        self._references[page] += 1

    def publish(self, page: int, key: Hashable) -> None:
        """Lets others find a full page. Of two pages with the same content, the first one is found."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def take(self, count: int) -> list[int]:
        """So many pages for one sequence to write, of which there must be as many free."""
        pages = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._unused.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._references[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Gives a sequence's pages back. Its last pages are used again before its first ones."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._unused[page] = None
                else:
                    self._blank.append(page)
