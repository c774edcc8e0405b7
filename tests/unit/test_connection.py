"""What a bound connection class does where no server is needed."""

from __future__ import annotations

import os
import select

import pytest

from poolkeeper._binding import LoopBinding, in_forked_child
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


def test_what_is_for_forked_children_is_left_out_where_nobody_forks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on Windows, which must import it all the same."""
    asked: list[object] = []
    monkeypatch.setattr(
        os, "register_at_fork", lambda after_in_child: asked.append(after_in_child), raising=False
    )
    in_forked_child(asked.clear)
    assert asked == [asked.clear]
    monkeypatch.delattr(os, "register_at_fork")
    in_forked_child(asked.clear)
    assert asked == [asked.clear]
