"""Who waits, the clock of those who wait, who holds a connection, and the load."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest

from poolkeeper import ClosedError, _checkouts
from poolkeeper._checkouts import SUSPECTED, Checkout, Ledger
from poolkeeper._clock import LineClock, SlowCallbacks, stalled_seconds
from poolkeeper._line import MOST_GRACE, Line, Waiter
from tests.unit.fake_time import FakeLoop

MakeWaiters = Callable[[int], list[Waiter]]


def a_waiter(timeout: float = 30.0, now: float | None = None) -> Waiter:
    frame = sys._getframe(1)
    deadline = (monotonic() if now is None else now) + timeout
    loop = asyncio.get_running_loop()
    return Waiter(loop, timeout, deadline, frame.f_code, frame.f_lineno)


@pytest.fixture
async def line() -> Line:
    return Line()


@pytest.fixture
async def join(line: Line) -> MakeWaiters:
    """A function that lets so many join the line."""

    def join(number: int) -> list[Waiter]:
        waiters = [a_waiter() for _ in range(number)]
        for waiter in waiters:
            line.append(waiter)
        return waiters

    return join


async def test_an_offer_reaches_the_task_once() -> None:
    waiter = a_waiter()
    assert waiter.offer("conn")
    assert not waiter.offer("another")
    assert await waiter.future == "conn"


async def test_a_refusal_reaches_the_task_once() -> None:
    waiter = a_waiter()
    waiter.refuse(ClosedError("closed"))
    waiter.refuse(ClosedError("again"))
    assert not waiter.offer("conn")
    with pytest.raises(ClosedError, match="closed"):
        await waiter.future


async def test_a_task_that_was_served_is_not_refused() -> None:
    waiter = a_waiter()
    waiter.offer("conn")
    waiter.refuse(ClosedError("closed"))
    assert await waiter.future == "conn"


async def test_a_task_that_was_cancelled_takes_nothing() -> None:
    waiter = a_waiter()
    waiter.future.cancel()
    assert not waiter.offer("conn")
    waiter.refuse(ClosedError("closed"))
    assert waiter.future.cancelled()


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


async def test_the_line_knows_the_tasks_that_wait(line: Line) -> None:
    async def wait() -> Waiter:
        waiter = a_waiter()
        line.append(waiter)
        return waiter

    tasks = [asyncio.create_task(wait()) for _ in range(5)]
    first, second, *_ = await asyncio.gather(*tasks)
    assert set(line.tasks) == set(tasks)
    assert line.popleft() is first
    line.leave(second)
    line.offer("conn")
    assert set(line.tasks) == set(tasks[3:])
    line.refuse_all(ClosedError("closed"))
    assert not line.tasks
    line.append(first)
    line.clear()
    assert not line.tasks


async def test_a_waiter_knows_whether_it_was_served() -> None:
    waits, served, refused, cancelled = (a_waiter() for _ in range(4))
    served.offer("conn")
    refused.refuse(ClosedError("closed"))
    cancelled.future.cancel()
    assert [w.was_served() for w in (waits, served, refused, cancelled)] == [
        False, True, False, False,
    ]  # fmt: skip
    assert refused.future.exception()


async def test_a_waiter_knows_its_task_and_its_line_of_code() -> None:
    waiter = a_waiter(5.0)
    assert waiter.task is asyncio.current_task()
    assert waiter.code.co_name == "test_a_waiter_knows_its_task_and_its_line_of_code"
    assert waiter.lineno == waiter.code.co_firstlineno + 1
    assert waiter.timeout == 5.0


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
    error = ClosedError("closed", detail="all of it")
    line.refuse_all(error)
    assert not line
    assert waiters[1].future.cancelled()
    first, last = waiters[0].future.exception(), waiters[2].future.exception()
    assert str(first) == str(last) == str(error)
    assert first is not last


async def test_the_line_can_be_cleared_without_a_word(line: Line, join: MakeWaiters) -> None:
    waiters = join(2)
    line.clear()
    assert not line
    assert not any(waiter.future.done() for waiter in waiters)


async def test_the_first_of_the_line_are_shown(line: Line, join: MakeWaiters) -> None:
    waiters = join(5)
    assert line.first(3) == waiters[:3]
    assert line.first(100) == waiters
    line.leave(waiters[1])
    assert line.first(2) == [waiters[0], waiters[2]]
    assert Line().first(3) == []


async def test_a_storm_of_leavers_costs_as_little_each_as_one(
    line: Line, join: MakeWaiters
) -> None:
    """From a deque it would be 10 000 times 10 000 steps."""
    waiters = join(10_000)
    steps = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal steps
        steps += 1

    gc.disable()  # what it finds of other tests, and runs, is not for us to count
    sys.setprofile(count)
    try:
        for waiter in reversed(waiters):
            line.leave(waiter)
    finally:
        sys.setprofile(None)
        gc.enable()
    assert not line
    assert steps < 100_000  # four calls and returns each


# --- the clock of those who wait ----------------------------------------------------------------


class Queue:
    """A line with its clock, on a loop whose time the test tells."""

    def __init__(self, loop: FakeLoop) -> None:
        self.loop = loop
        self.line = Line()
        self.clock = LineClock(
            loop,  # type: ignore[arg-type]
            self.line,
            self._expire,
            deadlock=self._deadlocked,
        )
        self.expired: list[tuple[Waiter, float]] = []
        self.slices: list[int] = []
        self.work = 0.0
        """Seconds that it takes to tell them."""
        self.deadlocked: list[tuple[Waiter, float]] = []
        self.believed = True

    def _expire(self, waiters: list[Waiter]) -> None:
        self.slices.append(len(waiters))
        for waiter in waiters:
            self.line.leave(waiter)
            self.expired.append((waiter, self.loop.now))
        self.loop.now += self.work

    def _deadlocked(self, waiter: Waiter) -> None:
        self.deadlocked.append((waiter, self.loop.now))
        if self.believed:
            self.line.leave(waiter)
            waiter.refuse(TimeoutError())

    def join(self, timeout: float, suspected: bool = False) -> Waiter:
        waiter = a_waiter(timeout, self.loop.now)
        if suspected:
            waiter.suspected = self.loop.now
        self.line.append(waiter)
        self.clock.watch(waiter)
        return waiter


@pytest.fixture
async def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    loop = FakeLoop()
    for module in ("_line", "_clock", "_checkouts"):
        monkeypatch.setattr(f"poolkeeper.{module}.monotonic", loop.time)
    return Queue(loop)


async def test_each_waiter_expires_at_its_own_deadline(queue: Queue) -> None:
    begin = queue.loop.now
    late, soon, middle = (queue.join(seconds) for seconds in (3.0, 0.5, 1.7))
    queue.loop.pass_time(10)
    assert [waiter for waiter, _ in queue.expired] == [soon, middle, late]
    assert [when - begin for _, when in queue.expired] == pytest.approx([0.5, 1.7, 3.0])


async def test_deadlines_that_lie_close_together_cost_one_look(queue: Queue) -> None:
    waiters = [queue.join(0.1 + number / 1e6) for number in range(1000)]
    looks = 0
    while queue.line:
        looks += 1
        queue.loop.pass_time(queue.loop.timers[0].due - queue.loop.now)
    assert [waiter for waiter, _ in queue.expired] == waiters
    assert looks <= 3


async def test_a_waiter_whose_time_is_up_already_expires_at_the_next_look(queue: Queue) -> None:
    waiter = queue.join(-1.0)
    assert not queue.expired  # not inside of watch()
    queue.loop.pass_time(LineClock.FINEST)
    assert [w for w, _ in queue.expired] == [waiter]


async def test_nothing_ticks_when_nobody_waits(queue: Queue) -> None:
    assert not queue.loop.timers
    waiter = queue.join(30)
    assert len(queue.loop.timers) == 1
    queue.loop.pass_time(1)
    assert len(queue.loop.timers) == 1
    queue.line.leave(waiter)
    queue.loop.pass_time(LineClock.TICK)
    assert not queue.loop.timers


@pytest.mark.parametrize("seconds", [0.1, 0.4, 30.0])
async def test_who_was_served_is_not_kept_when_nobody_waits(queue: Queue, seconds: float) -> None:
    """What it was served with, a connection that was given back by now, is not kept either."""
    first = queue.join(30.0)
    queue.loop.pass_time(1.5 * LineClock.TICK)  # it has looked what comes soon
    waiter = queue.join(seconds)
    for served in (first, waiter):
        served.offer(object())
        queue.line.leave(served)
        queue.clock.forget(served)
    kept = [weakref.ref(first.future), weakref.ref(waiter.future)]
    del first, waiter, served
    assert [ref() for ref in kept] == [None, None]


async def test_however_many_wait_there_is_one_timer(queue: Queue) -> None:
    for seconds in (5.0, 0.1, 7.0, 0.05, 0.2):
        queue.join(seconds)
        assert len(queue.loop.timers) == 1


async def test_at_each_look_those_who_still_wait_are_helped(queue: Queue) -> None:
    helped = 0

    def look() -> None:
        nonlocal helped
        helped += 1

    clock = LineClock(queue.loop, queue.line, queue._expire, look)  # type: ignore[arg-type]
    waiter = a_waiter(1.0, queue.loop.now)
    queue.line.append(waiter)
    clock.watch(waiter)
    queue.loop.pass_time(0.9)
    assert helped == 3
    queue.loop.pass_time(5)
    assert helped == 3  # nobody waits any more


async def test_a_clock_that_was_stopped_ticks_no_more(queue: Queue) -> None:
    queue.join(0.1)
    queue.clock.stop()
    queue.clock.stop()
    assert not queue.loop.timers
    queue.loop.pass_time(1)
    assert not queue.expired
    queue.join(0.1)
    queue.loop.pass_time(1)
    assert len(queue.expired) == 2


async def test_a_stall_is_given_back(queue: Queue) -> None:
    begin = queue.loop.now
    waiter = queue.join(1.0)
    queue.loop.stand_still(0.65)  # the look was due after 0.25 s
    queue.loop.pass_time(0.7)
    assert not queue.expired
    queue.loop.pass_time(0.1)
    assert [w for w, _ in queue.expired] == [waiter]
    assert waiter.deadline == pytest.approx(begin + 1.4)


async def test_a_stall_does_not_expire_a_waiter_that_could_not_be_served(queue: Queue) -> None:
    waiter = queue.join(0.5)
    queue.loop.stand_still(1.0)
    assert not queue.expired
    assert waiter.deadline > queue.loop.now


async def test_a_stall_that_was_before_a_wait_is_not_given_back(queue: Queue) -> None:
    begin = queue.loop.now
    queue.join(30.0)
    queue.loop.stand_still(0.65)
    waiter = queue.join(1.0)
    queue.loop.pass_time(1.1)
    assert [w for w, _ in queue.expired] == [waiter]
    assert waiter.deadline == begin + 1.65


async def test_a_delay_that_is_no_stall_is_not_given_back(queue: Queue) -> None:
    waiter = queue.join(1.0)
    deadline = waiter.deadline
    queue.loop.stand_still(LineClock.TICK + 0.09)
    assert queue.clock.stalls == ()
    queue.loop.pass_time(1.0)
    assert [w for w, _ in queue.expired] == [waiter]
    assert waiter.deadline == deadline


async def test_the_time_given_back_is_bounded_however_often_the_loop_stalls(queue: Queue) -> None:
    begin = queue.loop.now
    waiter = queue.join(3.0)
    for _ in range(4):
        queue.loop.stand_still(0.85)
    newcomer = queue.join(3.0)
    assert newcomer.grace == MOST_GRACE
    queue.loop.pass_time(1.0)
    assert [w for w, _ in queue.expired] == [waiter]
    assert begin + 3.0 < waiter.deadline <= begin + 3.0 + MOST_GRACE
    queue.loop.stand_still(60)
    queue.loop.pass_time(MOST_GRACE + 0.1)
    assert [w for w, _ in queue.expired] == [waiter, newcomer]


async def test_what_a_look_costs_does_not_depend_on_the_line(queue: Queue) -> None:
    for number in range(10_000):
        queue.join(20 + number / 1000)
    steps = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal steps
        steps += 1

    gc.disable()
    sys.setprofile(count)
    try:
        queue.loop.pass_time(10)
    finally:
        sys.setprofile(None)
        gc.enable()
    assert not queue.expired
    assert steps < 10_000  # forty looks


async def test_those_whose_time_is_up_together_are_told_in_slices(queue: Queue) -> None:
    waiters = [queue.join(1.0) for _ in range(2 * LineClock.SLICE + 7)]
    queue.loop.pass_time(1.0)
    assert queue.slices == [LineClock.SLICE, LineClock.SLICE, 7]
    assert [waiter for waiter, _ in queue.expired] == waiters
    assert queue.clock.stalls == ()
    assert not queue.loop.timers


async def test_what_it_takes_to_tell_them_is_no_stall(queue: Queue) -> None:
    for _ in range(2 * LineClock.SLICE):
        queue.join(1.0)
    queue.join(3.0)
    queue.work = 0.5
    queue.loop.pass_time(10.0)
    assert queue.slices == [LineClock.SLICE, LineClock.SLICE, 1]
    assert queue.clock.stalls == ()


async def test_one_who_was_served_is_not_looked_at(queue: Queue) -> None:
    waiter = queue.join(1.0)
    queue.line.offer("conn")
    other = queue.join(1.0)
    queue.loop.pass_time(2)
    assert [w for w, _ in queue.expired] == [other]
    assert waiter.future.result() == "conn"


async def test_the_clock_keeps_nobody_who_has_left(queue: Queue) -> None:
    """What was handed to them would be kept alive for as long as they would have waited."""
    waiter = queue.join(30.0)
    queue.line.leave(waiter)
    queue.clock.forget(waiter)
    queue.clock.forget(waiter)
    gone = weakref.ref(waiter.future)
    del waiter
    gc.collect()
    assert gone() is None


async def test_a_suspected_deadlock_is_looked_at_after_its_grace(queue: Queue) -> None:
    begin = queue.loop.now
    waiter = queue.join(30.0, suspected=True)
    queue.loop.pass_time(LineClock.DEADLOCK_GRACE - 0.01)
    assert not queue.deadlocked
    queue.loop.pass_time(0.02)
    ((suspect, when),) = queue.deadlocked
    assert suspect is waiter
    assert when - begin == pytest.approx(LineClock.DEADLOCK_GRACE, abs=LineClock.FINEST)
    queue.loop.pass_time(40)
    assert len(queue.deadlocked) == 1
    assert not queue.expired


async def test_one_who_was_suspected_wrongly_waits_on(queue: Queue) -> None:
    queue.believed = False
    waiter = queue.join(3.0, suspected=True)
    queue.loop.pass_time(2.9)
    assert [w for w, _ in queue.deadlocked] == [waiter]
    assert not waiter.suspected
    assert not queue.expired
    queue.loop.pass_time(0.2)
    assert [w for w, _ in queue.expired] == [waiter]


async def test_one_whose_time_is_up_before_the_grace_is_told_that(queue: Queue) -> None:
    waiter = queue.join(0.2, suspected=True)
    queue.loop.pass_time(0.3)
    assert [w for w, _ in queue.expired] == [waiter]
    assert not queue.deadlocked


async def test_the_grace_begins_anew_after_a_stall(queue: Queue) -> None:
    """Nobody could stop waiting meanwhile."""
    queue.join(30.0, suspected=True)
    queue.loop.pass_time(0.1)
    queue.loop.stand_still(2.0)
    assert not queue.deadlocked
    queue.loop.pass_time(LineClock.DEADLOCK_GRACE - 0.05)
    assert not queue.deadlocked
    queue.loop.pass_time(0.1)
    assert len(queue.deadlocked) == 1


async def test_stalls_are_remembered(queue: Queue) -> None:
    begin = queue.loop.now
    queue.join(1000.0)
    queue.loop.stand_still(LineClock.TICK + 2.0)
    queue.loop.stand_still(LineClock.TICK + 0.5)
    (first, long), (second, short) = queue.clock.stalls
    assert (first - begin, long) == pytest.approx((2.25, 2.0))
    assert (second - begin, short) == pytest.approx((3.0, 0.5))
    for _ in range(200):
        queue.loop.stand_still(LineClock.TICK + 0.2)
    assert len(queue.clock.stalls) == 128


@pytest.mark.parametrize(
    ("since", "until", "seconds"),
    [
        (0.0, 100.0, 5.0),
        (0.0, 11.0, 2.0),
        (12.0, 100.0, 3.0),
        (9.0, 10.0, 1.0),
        (13.0, 17.0, 0.0),
        (30.0, 40.0, 0.0),
    ],
    ids=["both", "one", "the other", "a part", "between", "long after"],
)
def test_only_the_part_of_a_stall_that_lay_in_a_wait_counts(
    since: float, until: float, seconds: float
) -> None:
    # From 8 to 10, from 17 to 20; and a loop that is only busy.
    stalls = ((9.0, 0.2), (10.0, 2.0), (14.0, 0.24), (20.0, 3.0))
    assert stalled_seconds(stalls, since, until) == seconds


async def test_what_asyncio_says_of_slow_callbacks_is_remembered() -> None:
    slow = SlowCallbacks()
    try:
        log = logging.getLogger("asyncio")
        log.warning("Executing %s took %.3f seconds", "<Handle cruncher() at x.py:1>", 0.5)
        assert slow.last == "<Handle cruncher() at x.py:1>"
        log.warning("socket.send() raised exception.")
        log.warning("Executing something else")
        log.info("Executing %s took %.3f seconds", "<Handle quick()>", 0.1)
        assert slow.last == "<Handle cruncher() at x.py:1>"
    finally:
        slow.stop()
    log.warning("Executing %s took %.3f seconds", "<Handle later()>", 0.5)
    assert slow.last == "<Handle cruncher() at x.py:1>"


# --- those who hold -----------------------------------------------------------------------------


class Session:
    """Stands for a server session."""


def a_checkout(structured: bool = True, session: Any = None) -> Checkout:
    frame = sys._getframe(1)
    task = asyncio.current_task()
    assert task is not None
    now = _checkouts.monotonic()  # a fake clock's, where there is one
    return Checkout(session or Session(), task, frame.f_code, frame.f_lineno, structured, now)


async def test_a_checkout_says_who_and_where() -> None:
    async def work() -> Checkout:
        return a_checkout()

    task = asyncio.create_task(work(), name="report-7")
    checkout = await task
    line = work.__code__.co_firstlineno + 1
    assert str(checkout) == f'in task "report-7" at tests/unit/test_checkouts.py:{line} in work'
    assert not checkout.by_this_task
    assert a_checkout().by_this_task


async def test_a_checkout_keeps_its_task_no_longer_than_its_connection() -> None:
    """What is left of it is in the errors of a connection that was given back."""
    ledger = Ledger(None)

    async def work() -> Checkout:
        checkout = a_checkout()
        ledger.begins(checkout, None)
        return checkout

    task = asyncio.create_task(work(), name="report-7")
    checkout = await task
    assert checkout.task is task
    told = str(checkout)
    ledger.ends(checkout, monotonic())
    gone = weakref.ref(task)
    del task
    await asyncio.sleep(0)
    gc.collect()
    assert gone() is None
    assert str(checkout) == told
    assert not checkout.by_this_task


async def test_a_checkout_counts_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poolkeeper._checkouts.monotonic", lambda: 100.0)
    checkout = a_checkout()
    assert checkout.held_seconds == 0
    monkeypatch.setattr("poolkeeper._checkouts.monotonic", lambda: 141.5)
    assert checkout.held_seconds == 41.5


async def test_a_stack_is_kept_only_where_it_is_asked_for() -> None:
    ledger = Ledger(1.0)
    without, with_one = a_checkout(), a_checkout()
    ledger.begins(without, None)

    def inner() -> None:
        ledger.begins(with_one, sys._getframe())

    inner()
    assert without.stack_text() == ""
    text = with_one.stack_text()
    # Outermost first, as a traceback.
    *_, caller, inmost = [line for line in text.splitlines() if line.startswith("  File")]
    assert caller.endswith("in test_a_stack_is_kept_only_where_it_is_asked_for")
    assert inmost.endswith("in inner")


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeLoop:
    loop = FakeLoop()
    for module in ("_line", "_clock", "_checkouts"):
        monkeypatch.setattr(f"poolkeeper.{module}.monotonic", loop.time)
    return loop


def hold(ledger: Ledger, time: FakeLoop, seconds: float, busy: float = 0.0) -> None:
    checkout = a_checkout()
    ledger.begins(checkout, None)
    time.pass_time(seconds)
    checkout.busy_seconds = busy
    ledger.ends(checkout, time.now)


async def test_the_ledger_is_read_longest_first(time: FakeLoop) -> None:
    ledger = Ledger(None)
    assert ledger.last_began == 0.0
    checkouts = []
    for _ in range(5):
        checkouts.append(a_checkout())
        ledger.begins(checkouts[-1], None)
        time.pass_time(1)
    assert ledger.longest_first() == checkouts
    ledger.ends(checkouts.pop(2), time.now)
    assert ledger.longest_first() == checkouts
    assert ledger.last_began == checkouts[-1].since


async def test_the_load_is_what_was_asked_of_late(time: FakeLoop) -> None:
    ledger = Ledger(None)
    assert (ledger.load().lately().acquires, ledger.load().lately().window_seconds) == (0, 0.0)
    for _ in range(4):
        hold(ledger, time, 0.5, busy=0.2)
    ledger.begins(a_checkout(), None)
    load = ledger.load().lately()
    assert (load.acquires, load.released) == (5, 4)
    assert load.window_seconds == 2.0
    assert load.held_seconds == 2.0
    assert load.query_seconds == pytest.approx(0.8)
    assert load.arrivals_per_second == 2.5
    assert load.mean_held_seconds == 0.5
    assert load.used_share == pytest.approx(0.4)


@pytest.mark.parametrize("seconds", [0.0, 0.5, 3.0, 10.0, 60.0])
async def test_the_load_covers_what_is_asked_for_and_a_second_at_most(
    time: FakeLoop, seconds: float
) -> None:
    ledger = Ledger(None)
    for _ in range(200):
        hold(ledger, time, 0.5)
        load = ledger.load().over(seconds)
        assert load.window_seconds <= seconds + Ledger.WINDOW + 0.5
        assert load.arrivals_per_second == pytest.approx(2.0)
        assert load.mean_held_seconds == 0.5
    assert load.window_seconds >= seconds


async def test_what_is_remembered_of_the_load_is_bounded(time: FakeLoop) -> None:
    ledger = Ledger(None)
    for _ in range(1000):
        hold(ledger, time, 0.5)
    load = ledger.load().over(1e6)
    assert load.window_seconds <= (Ledger.WINDOWS + 1) * (Ledger.WINDOW + 0.5)


async def test_a_load_that_was_taken_does_not_go_on(time: FakeLoop) -> None:
    ledger = Ledger(None)
    hold(ledger, time, 0.5)
    taken = ledger.load()
    before = taken.lately()
    for _ in range(20):
        hold(ledger, time, 0.5)
    assert taken.lately() == before


async def test_those_who_gave_up_are_counted(time: FakeLoop) -> None:
    ledger = Ledger(None)
    hold(ledger, time, 0.5)
    ledger.gave_up(3)
    time.pass_time(5)
    ledger.gave_up(4)
    assert ledger.load().over(10).gave_up == 7
    assert ledger.load().over(1).gave_up == 4


async def test_what_was_long_ago_does_not_thin_the_load_out(time: FakeLoop) -> None:
    """After a quiet night, the load is that of the morning."""
    ledger = Ledger(None)
    hold(ledger, time, 1.0)
    time.pass_time(3600)
    for _ in range(10):
        hold(ledger, time, 0.5)
    load = ledger.load().lately()
    assert load.window_seconds == 5.0
    assert load.arrivals_per_second == 2.0


async def test_connections_that_are_held_long_count_when_they_come_back(time: FakeLoop) -> None:
    ledger = Ledger(None)
    for _ in range(3):
        hold(ledger, time, 25.0)
    load = ledger.load().lately()
    assert load.released >= 1
    assert load.window_seconds >= 25.0
    assert load.mean_held_seconds == 25.0


async def test_a_checkout_is_overdue_once_it_is_past_the_threshold(time: FakeLoop) -> None:
    ledger = Ledger(5.0)
    first = a_checkout()
    ledger.begins(first, None)
    time.pass_time(1)
    second = a_checkout()
    ledger.begins(second, None)
    time.pass_time(3.9)
    assert ledger.overdue() == []
    time.pass_time(0.2)
    assert ledger.overdue() == [first]
    time.pass_time(1)
    assert ledger.overdue() == [first, second]
    first.told = SUSPECTED
    assert ledger.overdue() == [second]
    ledger.ends(second, time.now)
    assert ledger.overdue() == []


async def test_without_a_threshold_nobody_is_overdue(time: FakeLoop) -> None:
    ledger = Ledger(None)
    ledger.begins(a_checkout(), None)
    time.pass_time(1e6)
    assert ledger.overdue() == []


# --- who would complete a self-deadlock ---------------------------------------------------------


class Tasks:
    """Tasks that hold and wait as a test says."""

    def __init__(self) -> None:
        self.ledger = Ledger(None)
        self.line = Line()

    def new(self, name: str) -> asyncio.Task[None]:
        return asyncio.create_task(asyncio.sleep(0), name=name)

    def hold(self, task: asyncio.Task[None], structured: bool = True) -> Checkout:
        code = sys._getframe().f_code
        checkout = Checkout(Session(), task, code, 1, structured, monotonic())
        self.ledger.begins(checkout, None)
        return checkout

    def wait(self, task: asyncio.Task[None], timeout: float = 30.0) -> Waiter:
        waiter = a_waiter(timeout)
        waiter.task = task
        self.line.append(waiter)
        return waiter

    def deadlock(self, task: asyncio.Task[None], connections: int, timeout: float = 30.0) -> bool:
        return self.ledger.completes_deadlock(task, self.line, connections, timeout)


@pytest.fixture
async def tasks() -> Tasks:
    return Tasks()


async def test_the_last_holder_to_wait_completes_the_deadlock(tasks: Tasks) -> None:
    a, b = tasks.new("a"), tasks.new("b")
    tasks.hold(a)
    tasks.hold(b)
    assert not tasks.deadlock(a, 2)  # b may give its own back
    tasks.wait(a)
    assert tasks.deadlock(b, 2)


async def test_a_task_that_holds_all_connections_completes_it_alone(tasks: Tasks) -> None:
    a = tasks.new("a")
    tasks.hold(a)
    tasks.hold(a)
    assert tasks.deadlock(a, 2)


async def test_a_task_that_holds_nothing_completes_no_deadlock(tasks: Tasks) -> None:
    a, b = tasks.new("a"), tasks.new("b")
    tasks.hold(a)
    tasks.wait(a)
    assert not tasks.deadlock(b, 1)


async def test_there_is_no_deadlock_while_a_connection_is_free_or_can_be_made(
    tasks: Tasks,
) -> None:
    a = tasks.new("a")
    tasks.hold(a)
    assert not tasks.deadlock(a, 2)


async def test_there_is_no_deadlock_while_a_holder_does_not_wait(tasks: Tasks) -> None:
    a, b, c = tasks.new("a"), tasks.new("b"), tasks.new("c")
    tasks.hold(a)
    tasks.hold(b)
    tasks.wait(a)
    assert not tasks.deadlock(c, 2)


async def test_there_is_no_deadlock_while_anybody_may_give_a_connection_back(
    tasks: Tasks,
) -> None:
    a, b = tasks.new("a"), tasks.new("b")
    tasks.hold(a)
    tasks.hold(b, structured=False)
    tasks.wait(a)
    assert not tasks.deadlock(b, 2)


async def test_a_waiter_that_was_served_is_not_in_a_deadlock(tasks: Tasks) -> None:
    a, b = tasks.new("a"), tasks.new("b")
    tasks.hold(a)
    tasks.wait(a)
    tasks.hold(b)
    tasks.line.popleft()
    assert not tasks.deadlock(b, 2)


async def test_a_holder_that_will_give_up_before_the_caller_does_is_not_in_a_deadlock(
    tasks: Tasks,
) -> None:
    a, b, stranger = tasks.new("a"), tasks.new("b"), tasks.new("stranger")
    tasks.hold(a)
    tasks.hold(b)
    tasks.wait(a, timeout=10.0)
    tasks.wait(stranger, timeout=1.0)  # holds nothing, so frees nothing when it gives up
    assert not tasks.deadlock(b, 2, timeout=10.1)
    assert tasks.deadlock(b, 2, timeout=10.0)


async def test_a_deadlock_lasts_while_all_who_hold_go_on_to_wait(tasks: Tasks) -> None:
    a, b = tasks.new("a"), tasks.new("b")
    held = [tasks.hold(a), tasks.hold(b)]
    waiters = [tasks.wait(a), tasks.wait(b)]
    since = waiters[-1].since

    def lasts() -> bool:
        return tasks.ledger.deadlock_lasts(tasks.line, 2, since)

    assert lasts()
    tasks.line.leave(waiters[0])
    assert not lasts()
    tasks.wait(a)  # anew: it has done something in between
    assert not lasts()
    tasks.line.leave(tasks.line.tasks[a])
    tasks.line.append(waiters[0])
    assert lasts()
    held[0].structured = False
    assert not lasts()
    held[0].structured = True
    tasks.ledger.ends(held[1], monotonic())
    assert not lasts()
    tasks.hold(b)
    assert not lasts()
