"""What a bound connection class does where no server is needed."""

from __future__ import annotations

import gc
import os
import select

import psycopg
import pytest

from poolkeeper._binding import LoopBinding
from poolkeeper._connection import _poll_for, bound_class
from poolkeeper.errors import LoopMismatchError


class Keeper:
    name = "orders"
    close_returns = False


async def test_a_class_whose_pool_is_gone_connects_to_nothing() -> None:
    """The last task of a pool that was dropped finds out so."""
    keeper = Keeper()
    connection_class = bound_class(psycopg.AsyncConnection, keeper, LoopBinding("orders"))  # type: ignore[arg-type]
    del keeper
    gc.collect()
    with pytest.raises(psycopg.InterfaceError, match="the pool of this connection class is gone"):
        await connection_class.connect("host=127.0.0.1 port=1")


@pytest.mark.parametrize("has_poll", [True, False])
def test_a_socket_that_can_be_read_is_not_quiet(
    has_poll: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With poll(), and where there is none, as on Windows."""
    if not has_poll:
        monkeypatch.delattr(select, "poll")
    reader, writer = os.pipe()
    try:
        readable = _poll_for(reader)
        assert not readable()
        os.write(writer, b"x")
        assert readable()
        os.read(reader, 1)
        assert not readable()
    finally:
        os.close(reader)
        os.close(writer)


async def test_a_binding_without_a_pool_survives_a_fork() -> None:
    binding = LoopBinding("orders")
    binding._after_fork_in_child()
    with pytest.raises(LoopMismatchError, match="was opened in another process"):
        binding.check("acquire a connection")
