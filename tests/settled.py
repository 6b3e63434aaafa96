"""Waits for what is left to be aborted, which happens in the engine's thread after the next step."""

import time


def settled(llm):
    """Asserts that soon nothing runs, nothing waits, and all pages are free again."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        stats = llm.stats
        if stats.running == stats.waiting == stats.pages_used == 0 and llm.engine_thread.engine.idle:
            return
        time.sleep(0.005)
    raise AssertionError(f"left behind: {llm.stats}")
