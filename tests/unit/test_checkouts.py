"""The line of waiters, the one waiter, and the record of a checkout."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import pytest

from poolkeeper import ClosedError
from poolkeeper._checkouts import Checkout, Line, Waiter

MakeWaiters = Callable[[int], list[Waiter]]


@pytest.fixture
async def line() -> Line:
    return Line()


@pytest.fixture
async def join(line: Line) -> MakeWaiters:
    """A function that lets so many join the line."""

    def join(number: int) -> list[Waiter]:
        waiters = [Waiter(asyncio.get_running_loop()) for _ in range(number)]
        for waiter in waiters:
            line.append(waiter)
        return waiters

    return join


async def test_an_offer_reaches_the_task_once() -> None:
    waiter = Waiter(asyncio.get_running_loop())
    assert waiter.offer("conn")
    assert not waiter.offer("another")
    assert await waiter.future == "conn"


async def test_a_refusal_reaches_the_task_once() -> None:
    waiter = Waiter(asyncio.get_running_loop())
    waiter.refuse(ClosedError("closed"))
    waiter.refuse(ClosedError("again"))
    assert not waiter.offer("conn")
    with pytest.raises(ClosedError, match="closed"):
        await waiter.future


async def test_a_task_that_was_served_is_not_refused() -> None:
    waiter = Waiter(asyncio.get_running_loop())
    waiter.offer("conn")
    waiter.refuse(ClosedError("closed"))
    assert await waiter.future == "conn"


async def test_a_task_that_was_cancelled_takes_nothing() -> None:
    waiter = Waiter(asyncio.get_running_loop())
    waiter.future.cancel()
    assert not waiter.offer("conn")
    waiter.refuse(ClosedError("closed"))
    assert waiter.future.cancelled()


async def test_a_waiter_answers_as_psycopg_pools_own_do() -> None:
    served, refused = (Waiter(asyncio.get_running_loop()) for _ in range(2))
    assert await served.set("conn") is True
    assert await served.set("another") is False
    assert await refused.fail(ClosedError("closed")) is True
    assert served.future.result() == "conn"
    assert isinstance(refused.future.exception(), ClosedError)


async def test_first_come_first_served(line: Line, join: MakeWaiters) -> None:
    waiters = join(3)
    for number, waiter in enumerate(waiters):
        assert line.offer(number)
        assert waiter.future.result() == number
        assert len(line) == 2 - number


async def test_nobody_in_the_line_takes_nothing(line: Line) -> None:
    assert not line
    assert not line.offer("conn")


async def test_one_may_leave_from_anywhere(line: Line, join: MakeWaiters) -> None:
    first, second, third, fourth = join(4)
    line.leave(second)
    line.leave(fourth)
    assert len(line) == 2
    assert list(line) == [first, third]
    line.leave(first)
    assert line.offer("conn")
    assert third.future.result() == "conn"
    assert not line.offer("another")


async def test_one_who_is_not_in_the_line_may_leave(line: Line, join: MakeWaiters) -> None:
    (waiter,) = join(1)
    line.leave(waiter)
    line.leave(waiter)
    assert not line


async def test_an_offer_skips_those_who_are_gone(line: Line, join: MakeWaiters) -> None:
    cancelled, timed_out, third = join(3)
    cancelled.future.cancel()
    timed_out.refuse(TimeoutError())
    assert line.offer("conn")
    assert third.future.result() == "conn"
    assert not line
    with pytest.raises(TimeoutError):
        timed_out.future.result()


async def test_an_offer_to_a_line_of_the_gone_finds_nobody(line: Line, join: MakeWaiters) -> None:
    for waiter in join(3):
        waiter.future.cancel()
    assert not line.offer("conn")
    assert not line


async def test_everybody_is_refused_at_once(line: Line, join: MakeWaiters) -> None:
    waiters = join(3)
    waiters[1].future.cancel()
    error = ClosedError("closed")
    line.refuse_all(error)
    assert not line
    assert waiters[0].future.exception() is error
    assert waiters[1].future.cancelled()
    assert waiters[2].future.exception() is error


async def test_the_line_can_be_cleared_without_a_word(line: Line, join: MakeWaiters) -> None:
    waiters = join(2)
    line.clear()
    assert not line
    assert not any(waiter.future.done() for waiter in waiters)


async def test_those_who_leave_while_the_line_is_read_do_no_harm(
    line: Line, join: MakeWaiters
) -> None:
    waiters = join(3)
    seen = []
    for waiter in line:
        seen.append(waiter)
        line.leave(waiter)
    assert seen == waiters
    assert not line


async def test_a_storm_of_leavers_costs_as_little_each_as_one(
    line: Line, join: MakeWaiters
) -> None:
    """From a deque it would be 10 000 times 10 000 steps."""
    waiters = join(10_000)
    steps = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal steps
        steps += 1

    sys.setprofile(count)
    try:
        for waiter in reversed(waiters):
            line.leave(waiter)
    finally:
        sys.setprofile(None)
    assert not line
    assert steps < 100_000  # four calls and returns each


def a_checkout() -> Checkout:
    frame = sys._getframe(1)
    return Checkout(frame.f_code, frame.f_lineno)


async def test_a_checkout_says_who_and_where() -> None:
    async def work() -> Checkout:
        return a_checkout()

    task = asyncio.create_task(work(), name="report-7")
    checkout = await task
    line = work.__code__.co_firstlineno + 1
    assert str(checkout) == f'in task "report-7" at tests/unit/test_checkouts.py:{line}'
    assert not checkout.by_this_task
    assert a_checkout().by_this_task


async def test_a_checkout_does_not_keep_its_task() -> None:
    async def work() -> Checkout:
        return a_checkout()

    checkout = await asyncio.create_task(work())
    await asyncio.sleep(0)
    assert checkout.task() is None
    assert not checkout.by_this_task


async def test_a_checkout_counts_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poolkeeper._checkouts.monotonic", lambda: 100.0)
    checkout = a_checkout()
    assert checkout.held_seconds == 0
    monkeypatch.setattr("poolkeeper._checkouts.monotonic", lambda: 141.5)
    assert checkout.held_seconds == 41.5
