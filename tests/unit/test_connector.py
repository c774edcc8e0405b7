"""When the connector makes a connection: how many at once, how often, and when it gives one up."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from poolkeeper._attempt import Failure, attempt_here
from poolkeeper._recovery import Connector
from tests.unit.fake_time import FakeLoop

REFUSED = psycopg.OperationalError("Connection refused")
NO_ROLE = psycopg.OperationalError('FATAL:  role "app" does not exist')

PROBE = Connector.PROBE_EVERY


_psycopg: dict[str, Any] = {"__name__": "psycopg"}
exec("def fail(error): raise error", _psycopg)
as_psycopg = _psycopg["fail"]
"""Raises an error as psycopg does, which alone is asked what the server said."""


class FakePool:
    """A pool whose server answers when and what the test says."""

    name = "orders"
    num_workers = 3
    max_size = 100
    outage = 0.0
    needed = False
    connector: Connector
    params: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.attempts: list[asyncio.Future[None]] = []
        self.made = 0
        self.failed: list[Failure] = []
        self.over: list[tuple[float, int]] = []
        self.spare = 0
        self.tasks_go_on = True

    def in_need(self) -> bool:
        return self.needed

    def room(self) -> int:
        return self.max_size - self.made

    def outage_goes_on(self, seconds: float) -> None:
        self.outage = seconds

    def outage_over(self, seconds: float, attempts_failed: int) -> None:
        self.over.append((seconds, attempts_failed))

    async def make_connection(self) -> None:
        attempt_here().params = self.params
        attempt = asyncio.get_running_loop().create_future()
        self.attempts.append(attempt)
        try:
            await attempt
        except psycopg.Error as ex:
            as_psycopg(ex.with_traceback(None))
        self.connector.answered()
        if self.connector.claim():
            self.made += 1

    def may_start_tasks(self) -> bool:
        return self.tasks_go_on

    def spare_attempts(self, wanted: int) -> int:
        given_up = max(0, min(wanted, self.spare))
        self.spare -= given_up
        return given_up

    def connect_failed(self, failure: Failure, began: float) -> None:
        self.failed.append(failure)

    @property
    def unanswered(self) -> list[asyncio.Future[None]]:
        return [attempt for attempt in self.attempts if not attempt.done()]


class Server:
    """The connector of a pool, and the time and the server that it has to do with."""

    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.pool = FakePool()
        self.connector = Connector(self.pool, self.loop)  # type: ignore[arg-type]
        self.pool.connector = self.connector

    async def want(self, number: int) -> None:
        for _ in range(number):
            self.connector.add()
        await settle()

    async def answer(self, error: Exception | None = None, number: int | None = None) -> None:
        """Answer the attempts that wait for it, or so many of them, the oldest first."""
        for attempt in self.pool.unanswered[:number]:
            if error is None:
                attempt.set_result(None)
            else:
                attempt.set_exception(error)
        await settle()

    async def pass_time(self, seconds: float) -> None:
        """Let time pass, a little at a time, and let tasks run meanwhile."""
        for _ in range(round(seconds * 16)):
            self.loop.pass_time(1 / 16)  # a float that adds up
            await settle()

    async def log_in(self) -> None:
        """Let one connection be made at once: from here on it is known how long that takes."""
        await self.want(1)
        await self.answer()

    async def until_refused(self, number: int = 1) -> None:
        """Let *number* connections be wanted, and the server refuse."""
        await self.want(number)
        await self.answer(REFUSED)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    server = Server()
    monkeypatch.setattr("poolkeeper._recovery.monotonic", server.loop.time)
    monkeypatch.setattr("poolkeeper._attempt.monotonic", server.loop.time)
    monkeypatch.setattr("poolkeeper._between.monotonic", server.loop.time)
    yield server
    tasks = server.connector.stop()
    await settle()
    assert all(task.done() for task in tasks)
    assert not [t for t in asyncio.all_tasks() if t.get_name() == "orders-connect"]
    assert not server.loop.timers


# --- while the server answers -------------------------------------------------------------------


async def test_connections_are_made_as_many_at_once_as_there_are_workers(server: Server) -> None:
    await server.want(5)
    assert server.connector.pending == len(server.pool.unanswered) == 3
    assert server.connector.wanted == 5
    await server.answer(number=1)
    assert server.connector.pending == 3
    await server.answer()
    assert server.connector.pending == 1
    await server.answer()
    assert (server.connector.pending, server.connector.wanted) == (0, 0)
    assert server.pool.made == len(server.pool.attempts) == 5


async def test_nothing_ticks_while_the_server_answers(server: Server) -> None:
    await server.want(2)
    await server.answer()
    assert not server.loop.timers
    assert server.connector.next_attempt_seconds is None
    assert server.connector.last_error is None


async def test_nothing_is_made_that_nobody_wants(server: Server) -> None:
    server.connector.go_on()
    await settle()
    assert not server.pool.attempts


# --- while it does not ---------------------------------------------------------------------------


async def test_one_probe_is_sent_per_interval(server: Server) -> None:
    await server.until_refused(3)
    assert len(server.pool.attempts) == 3
    for number in range(4, 20):
        await server.pass_time(PROBE)
        assert len(server.pool.attempts) == number
        await server.answer(REFUSED)
    assert server.connector.wanted == 3


async def test_what_is_added_meanwhile_waits_for_the_probe(server: Server) -> None:
    await server.until_refused()
    await server.want(10)
    server.connector.go_on()
    await settle()
    assert not server.pool.unanswered
    assert len(server.loop.timers) == 1
    assert server.connector.next_attempt_seconds == PROBE
    await server.pass_time(PROBE)
    assert len(server.pool.unanswered) == 1


async def test_a_failure_is_written_down(server: Server) -> None:
    await server.until_refused(2)
    begin = server.loop.now
    await server.pass_time(PROBE)
    await server.answer(REFUSED)
    connector = server.connector
    assert connector.last_error is REFUSED
    assert connector.last_error.__traceback__ is None
    assert connector.failures == len(server.pool.failed) == 3
    assert connector.failing_since == begin
    assert connector.last_failed == pytest.approx(begin + PROBE)
    assert connector.pending == 0


async def test_a_success_lets_all_others_go_on_at_once(server: Server) -> None:
    await server.until_refused(5)
    await server.pass_time(PROBE)
    await server.answer()
    assert server.connector.last_error is None
    assert server.connector.failures == 0
    assert server.connector.pending == 3
    assert server.connector.next_attempt_seconds is None
    ((seconds, failed),) = server.pool.over
    assert (seconds, failed) == (pytest.approx(PROBE), 3)
    await server.answer()
    await server.answer()
    assert server.pool.made == 5


async def test_a_success_that_comes_before_the_next_probe_ends_the_probing(
    server: Server,
) -> None:
    await server.want(2)
    await server.answer(REFUSED, number=1)
    assert len(server.loop.timers) == 1
    await server.answer()
    assert server.connector.next_attempt_seconds is None
    assert server.connector.pending == 1
    await server.answer()
    assert not server.loop.timers


async def test_the_last_success_of_all_ends_the_probing(server: Server) -> None:
    await server.until_refused()
    await server.pass_time(PROBE)
    await server.answer()
    assert not server.loop.timers
    await server.pass_time(5)
    assert len(server.pool.attempts) == 2


async def test_a_reason_that_stays_is_probed_for_more_slowly(server: Server) -> None:
    await server.want(1)
    await server.answer(NO_ROLE)
    slow = Connector.PROBE_EVERY_IF_PERMANENT
    assert server.connector.next_attempt_seconds == slow
    await server.pass_time(slow - 1 / 16)
    assert len(server.pool.attempts) == 1
    await server.pass_time(1 / 16)
    assert len(server.pool.attempts) == 2
    await server.answer(NO_ROLE)
    await server.pass_time(slow)
    await server.answer()
    assert server.pool.made == 1


async def test_connections_that_nobody_needs_any_more_are_not_probed_for(server: Server) -> None:
    await server.until_refused(3)
    server.pool.spare = 3
    await server.pass_time(PROBE)
    assert server.connector.wanted == 0
    assert len(server.pool.attempts) == 3
    assert not server.loop.timers
    await server.want(1)
    assert len(server.loop.timers) == 1
    await server.pass_time(PROBE)
    assert len(server.pool.unanswered) == 1


async def test_an_attempt_under_way_is_not_spared(server: Server) -> None:
    await server.until_refused(2)
    await server.pass_time(PROBE)
    server.pool.spare = 2
    await server.pass_time(PROBE)
    assert server.connector.wanted == 1  # the one under way
    await server.answer()
    assert server.pool.made == 1


# --- an attempt that gets no answer --------------------------------------------------------------


async def test_another_probe_starts_beside_one_without_an_answer(server: Server) -> None:
    await server.until_refused(5)
    await server.pass_time(PROBE)
    assert len(server.pool.unanswered) == 1
    await server.pass_time(Connector.BESIDE_AFTER - PROBE)
    assert len(server.pool.unanswered) == 1
    await server.pass_time(2 * PROBE)
    assert len(server.pool.unanswered) == 2
    await server.pass_time(Connector.BESIDE_AFTER)
    assert len(server.pool.unanswered) == 3
    await server.answer(number=-1)  # all but the last
    assert server.pool.made == 2
    assert server.connector.last_error is None


async def test_there_are_never_more_of_them_than_workers(server: Server) -> None:
    await server.until_refused(10)
    for _ in range(200):
        await server.pass_time(PROBE)
        assert len(server.pool.unanswered) <= FakePool.num_workers


async def test_an_attempt_without_an_answer_needs_no_failure_to_be_noticed(
    server: Server,
) -> None:
    """Packets are dropped from one moment to the next: nothing ever fails."""
    await server.log_in()
    await server.want(1)
    await server.pass_time(Connector.BESIDE_AFTER + PROBE)
    assert len(server.pool.unanswered) == 2
    server.pool.unanswered[1].set_result(None)
    await settle()
    assert server.pool.made == 2
    assert not server.pool.unanswered  # the other one is not wanted any more
    assert not server.loop.timers


async def test_the_youngest_is_given_up_for_a_new_one_again_and_again(server: Server) -> None:
    """Of a server that answers new connections only, and of a slow one alike."""
    await server.log_in()
    await server.want(3)
    first, second, third = server.pool.unanswered
    for _ in range(3):
        await server.pass_time(1)
        assert third.cancelled()
        assert server.pool.unanswered[:2] == [first, second]
        third = server.pool.attempts[-1]
    assert server.connector.last_error is None


async def test_both_of_two_that_are_answered_at_once_are_not_both_kept(server: Server) -> None:
    await server.log_in()
    await server.want(1)
    await server.pass_time(Connector.BESIDE_AFTER + PROBE)
    assert len(server.pool.unanswered) == 2
    await server.answer()
    assert server.pool.made == 2
    assert server.connector.wanted == 0
    assert not server.connector.claim()


async def test_logins_that_are_slow_are_not_taken_for_silence(server: Server) -> None:
    await server.want(1)
    await server.pass_time(2)
    await server.answer(number=1)
    await server.want(1)
    before = len(server.pool.attempts)
    await server.pass_time(4)
    assert len(server.pool.attempts) == before
    await server.answer()
    assert server.pool.made == 2


async def test_the_first_login_may_be_slow(server: Server) -> None:
    """Nothing is known yet of how long one takes: there is one attempt for each connection."""
    await server.want(2)
    await server.pass_time(Connector.FIRST_LOGIN - 0.5)
    assert len(server.pool.attempts) == 2
    await server.pass_time(2)
    assert len(server.pool.attempts) == 3
    assert not any(attempt.cancelled() for attempt in server.pool.attempts)
    await server.answer()
    assert server.pool.made == 2


@pytest.mark.parametrize("size", [2, 3, 5])
async def test_sessions_and_attempts_are_never_more_than_max_size(
    server: Server, size: int
) -> None:
    server.pool.max_size = size
    await server.log_in()
    await server.want(size - 1)
    for _ in range(40):
        await server.pass_time(PROBE)
        assert server.pool.made + len(server.pool.unanswered) <= size
    await server.answer()
    for _ in range(5):
        await server.answer()
    assert server.pool.made == size


async def test_no_answer_is_told_of_once_and_the_attempt_goes_on(server: Server) -> None:
    server.pool.max_size = 2
    await server.want(1)
    await server.pass_time(Connector.FIRST_LOGIN + 1)
    assert isinstance(server.connector.last_error, psycopg.errors.ConnectionTimeout)
    assert server.pool.failed == [server.connector.last_failure]
    first = server.pool.attempts[0]
    assert not first.done()
    await server.pass_time(5)
    assert server.connector.failures == 1
    assert server.pool.outage > Connector.FIRST_LOGIN + 5
    first.set_result(None)
    await settle()
    assert server.connector.last_failure is None
    assert server.pool.made == 1


@pytest.mark.parametrize("size", [2, 10])
async def test_the_oldest_has_all_the_time_that_psycopg_gives_it(server: Server, size: int) -> None:
    server.pool.max_size = size
    await server.until_refused(size)
    await server.pass_time(PROBE)
    (oldest,) = server.pool.unanswered
    begin = len(server.pool.attempts)
    await server.pass_time(130)
    assert not oldest.done()
    assert len(server.pool.attempts) < begin + 2.5 * 130  # between one and two in a second
    assert server.connector.wanted == size


async def test_the_only_one_that_there_is_room_for_is_replaced_with_growing_patience(
    server: Server,
) -> None:
    server.pool.max_size = 1
    await server.until_refused(1)
    await server.pass_time(PROBE)
    began = [server.loop.now]
    for _ in range(400 * 4):
        before = len(server.pool.attempts)
        await server.pass_time(PROBE)
        if len(server.pool.attempts) > before:
            began.append(server.loop.now)
        assert len(server.pool.unanswered) <= 1
    lasted = [after - before for before, after in itertools.pairwise(began)]
    assert lasted == sorted(lasted)
    assert lasted[0] < 2
    assert 60 <= lasted[-1] < 62
    assert all(after <= 1.5 * before + 4 * PROBE for before, after in itertools.pairwise(lasted))
    await server.answer()
    assert server.connector._patience == Connector.PATIENCE


@pytest.mark.parametrize(
    "params", [{"connect_timeout": "100"}, {"host": "a,b"}, {"hostaddr": "1.1.1.1,1.1.1.2"}]
)
async def test_the_only_one_is_left_alone_if_the_user_or_a_list_of_servers_says_so(
    server: Server, params: dict[str, str]
) -> None:
    server.pool.max_size = 1
    server.pool.params = params
    await server.until_refused(1)
    await server.pass_time(90)
    (attempt,) = server.pool.unanswered
    assert len(server.pool.attempts) == 2
    attempt.set_result(None)
    await settle()
    assert server.pool.made == 1


async def test_who_asks_does_not_wait_long_for_a_reason_that_stays(server: Server) -> None:
    await server.want(1)
    await server.answer(NO_ROLE)
    await server.pass_time(0.25)
    server.connector.hurry()
    await server.pass_time(0.25)
    assert len(server.pool.unanswered) == 1
    await server.answer(NO_ROLE)
    await server.pass_time(1)
    server.connector.hurry()
    await server.pass_time(1 / 16)
    assert len(server.pool.unanswered) == 1
    await server.answer(REFUSED)
    server.connector.hurry()
    assert server.connector.next_attempt_seconds == PROBE


async def test_who_waits_already_does_not_wait_long_for_a_reason_that_stays(
    server: Server,
) -> None:
    server.pool.needed = True
    await server.want(1)
    await server.answer(NO_ROLE)
    assert server.connector.next_attempt_seconds == Connector.PROBE_IF_PERMANENT_AND_ASKED


# --- cancelled, stopped, abandoned ----------------------------------------------------------------


async def test_attempts_that_somebody_cancelled_go_on_when_told_to(server: Server) -> None:
    """As at the end of ``asyncio.run()``, or by whoever cancels all tasks there are."""
    await server.want(2)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await settle()
    assert server.connector.pending == 0
    assert server.connector.wanted == 2
    assert server.connector.last_error is None
    server.connector.go_on()
    await settle()
    await server.answer()
    assert server.pool.made == 2


async def test_nothing_is_started_on_a_loop_that_is_ending(server: Server) -> None:
    server.pool.tasks_go_on = False
    await server.want(2)
    assert not server.pool.attempts
    server.pool.tasks_go_on = True
    server.connector.go_on()
    await settle()
    await server.answer(REFUSED)
    server.pool.tasks_go_on = False
    await server.pass_time(PROBE)
    assert len(server.pool.attempts) == 2
    assert not server.loop.timers
    server.pool.tasks_go_on = True
    server.connector.go_on()
    await server.pass_time(PROBE)
    await server.answer()
    await server.answer()
    assert server.pool.made == 2


async def test_stop_leaves_no_task_and_no_timer(server: Server) -> None:
    await server.want(5)
    await server.answer(REFUSED, number=1)
    tasks = server.connector.stop()
    assert len(tasks) == 2
    await asyncio.wait(tasks, timeout=10)
    assert all(task.cancelled() for task in tasks)
    assert server.connector.pending == 0
    assert server.connector.next_attempt_seconds is None
    server.connector.add()
    server.connector.go_on()
    await server.pass_time(5)
    assert not server.loop.timers
    assert len(server.pool.attempts) == 3


async def test_a_failure_that_comes_with_the_stop_starts_nothing(server: Server) -> None:
    await server.want(2)
    server.pool.attempts[0].set_exception(REFUSED)
    server.connector.stop()
    await server.pass_time(5)
    assert len(server.pool.attempts) == 2
    assert not server.loop.timers


async def test_an_abandoned_connector_gives_its_tasks_away_as_they_are(server: Server) -> None:
    await server.want(2)
    tasks = server.connector.abandon()
    assert len(tasks) == 2
    assert not any(task.cancelling() for task in tasks)
    server.connector.add()
    await settle()
    assert len(server.pool.attempts) == 2
