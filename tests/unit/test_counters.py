"""What `get_stats()` counts."""

from poolkeeper._counters import Counters


def test_what_was_counted_is_told_even_if_it_comes_to_nothing() -> None:
    """As psycopg_pool does: a connection that took no whole millisecond has its key."""
    counters = Counters()
    assert counters.read() == {}
    counters.count("connections_ms", 0)
    assert counters.pop() == {"connections_ms": 0}
    assert counters.read() == {}
    counters.requests += 1
    assert counters.read() == {"requests_num": 1}
