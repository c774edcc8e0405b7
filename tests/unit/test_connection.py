"""What a bound connection class does where no server is needed."""

from __future__ import annotations

import os
import select

import pytest

from poolkeeper._binding import LoopBinding
from poolkeeper._session import _poll_for
from poolkeeper.errors import LoopMismatchError


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
