"""What schedulers are put through, as strategies of hypothesis: names and arguments of what a test's device does."""

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

CALLS = (
    st.tuples(st.just("launch"), st.integers(1, 8)),
    st.tuples(st.just("launch"), st.integers(1, 8)),
    st.tuples(st.just("take")),
    st.tuples(st.just("abort"), st.integers(0, 100)),
)
RESTART = st.tuples(st.just("restart"))


def sequences(*requests: SearchStrategy, min_size: int) -> SearchStrategy[list[tuple]]:
    """Requests, in the forms in which a test's device adds them, among calls; a restart now and then."""
    operation = st.one_of(*requests, *CALLS)
    return st.lists(st.one_of(*[operation] * 9, RESTART), min_size=min_size, max_size=60)
