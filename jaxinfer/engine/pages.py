"""The host's side of the cache: which pages are free."""

from __future__ import annotations


class PageAllocator:
    """Hands out page ids 1 .. num_pages-1. Page 0 takes what padding tokens write and is never handed out."""

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 2:
            raise ValueError(f"num_pages is {num_pages}: it must be at least 2, as page 0 is reserved")
        self.page_size = page_size
        self.num_pages = num_pages
        self.reset()

    def reset(self) -> None:
        """Takes all pages back, whoever holds them."""
        self._free = list(range(self.num_pages - 1, 0, -1))

    @property
    def free_count(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """How many pages hold this many tokens."""
        return -(-tokens // self.page_size)

    def grow(self, pages: list[int], tokens: int) -> bool:
        """Extends a sequence's pages to hold `tokens`; False, and nothing taken, if too few are free."""
        missing = self.pages_for(tokens) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            pages.append(self._free.pop())
        return True

    def release(self, pages: list[int]) -> None:
        """Takes a sequence's pages back and empties the list."""
        self._free.extend(reversed(pages))
        pages.clear()
