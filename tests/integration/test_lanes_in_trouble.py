"""One-shots that share a connection, and what befalls the connection, the server, the process."""

from __future__ import annotations

import asyncio
import gc
import select
import textwrap
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import psycopg
import pytest

from poolkeeper import ClosedError, LoopMismatchError, PoolManager, _lane
from poolkeeper._asked import FATAL_ERROR, Asked, received
from poolkeeper._embedded import EmbeddedServer
from tests.support.inside import life
from tests.support.lanes import PLAIN, READ, know, lanes, locked, trust
from tests.support.pair import pair
from tests.support.programs import run_program
from tests.support.proxy import FaultProxy
from tests.support.server import admin, kill_sessions
from tests.support.waiting import eventually, until

MakeManager = Callable[..., PoolManager[Any]]

COUNT = "select count(*) from generate_series(1, %s::bigint)"
BEHIND = 15
"""How many are sent behind one: then it is full."""
SENT = ["The statement had been sent to the server: what it changes may be done all the same."]


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No statement is slow, so that all of them are under way for as long as a test wants."""
    trust(monkeypatch)


@pytest.fixture
def table(database: str) -> str:
    """A database with a table t: n is 1, 2, 3."""
    admin(database, "create table t (n int unique)")
    admin(database, "insert into t select generate_series(1, 3)")
    return database


@pytest.fixture
async def one(table: str, trusting: None) -> AsyncIterator[PoolManager[Any]]:
    """A manager with one connection, which knows two statements as quick."""
    async with PoolManager(table, min_size=1, max_size=1, name="lane", timeout=20) as db:
        await know(db, READ, PLAIN)
        yield db


class Lane:
    """A full lane: at its head a read that takes long, for a lock by default; others behind it."""

    def __init__(self, db: PoolManager[Any], query: str = READ, *params: int) -> None:
        self.db = db
        self._head = query, params or None
        self.tasks: list[asyncio.Task[Any]] = []

    async def fill(self, *, more: int = 0, behind: str = PLAIN) -> None:
        """Send as many as it takes behind a read, and let *more* of them wait in line."""
        self.tasks = [asyncio.create_task(self.db.fetchall(*self._head))]
        await asyncio.sleep(0)
        for n in range(BEHIND + more):
            params = (n,) if behind is PLAIN else None
            self.tasks.append(asyncio.create_task(self.db.fetchall(behind, params)))
        await asyncio.sleep(0)
        snapshot = self.db.snapshot()
        assert [len(row.behind) for row in snapshot.checkouts] == [BEHIND]
        assert snapshot.waiting == more

    async def ends(self) -> list[Any]:
        """What each has returned, or raised."""
        async with asyncio.timeout(20):
            return await asyncio.gather(*self.tasks, return_exceptions=True)


ROWS = [(1,), (2,), (3,)]


def numbers(count: int) -> list[Any]:
    return [[(n,)] for n in range(count)]


# --- the connection ------------------------------------------------------------------------------


async def test_of_sixteen_on_a_session_that_is_killed_only_the_one_at_its_head_fails(
    one: PoolManager[Any], table: str
) -> None:
    """With the server's reason; the others are answered elsewhere, and those in line as well."""
    lane = Lane(one)
    with locked(table):
        await lane.fill(more=5)
        kill_sessions(table, "poolkeeper:lane")
        head, *others = await lane.ends()
    assert isinstance(head, psycopg.errors.AdminShutdown)
    assert head.__notes__ == SENT
    assert others == numbers(BEHIND + 5)


async def test_of_sixteen_on_a_link_that_is_cut_only_the_one_at_its_head_fails(
    make_manager: MakeManager, table: str, trusting: None
) -> None:
    """Without a word of the server's."""
    async with FaultProxy(table) as proxy:
        db = make_manager(proxy.dsn, min_size=1, max_size=1, timeout=20)
        await db.open()
        await know(db, READ, PLAIN)
        lane = Lane(db)
        with locked(table):
            await lane.fill()
            await asyncio.to_thread(proxy.cut)
            head, *others = await lane.ends()
        assert isinstance(head, psycopg.OperationalError)
        assert head.__notes__ == SENT
        assert others == numbers(BEHIND)
        await db.close(timeout=0)


async def test_a_write_whose_session_is_killed_says_why_and_that_it_was_sent(
    one: PoolManager[Any], table: str, server_sessions: Callable[[str], int]
) -> None:
    with locked(table):
        task = asyncio.create_task(one.execute("insert into t values (4)"))
        query = "select 1 from pg_locks where not granted"
        assert await asyncio.to_thread(eventually, partial(admin, table, query))
        kill_sessions(table, "poolkeeper:lane")
        with pytest.raises(psycopg.errors.AdminShutdown, match="administrator command") as caught:
            await task
    assert caught.value.__notes__ == SENT
    assert await one.fetchall(READ) == ROWS


async def test_a_write_that_was_not_sent_to_its_end_says_so(
    make_manager: MakeManager, table: str
) -> None:
    """The network takes no more: the server does not have what it would commit."""
    admin(table, "create table u (word text)")
    async with FaultProxy(table) as proxy:
        db = make_manager(proxy.dsn, min_size=1, max_size=1, timeout=20)
        await db.open()
        proxy.stall()
        task = asyncio.create_task(db.execute("insert into u values (%s)", ("x" * 50_000_000,)))
        await until(lambda: db.snapshot().in_use)
        await asyncio.to_thread(proxy.cut)
        with pytest.raises(psycopg.OperationalError) as caught:
            await task
        notes = ["The statement had not been sent to its end: it has changed nothing."]
        assert caught.value.__notes__ == notes
        assert admin(table, "select count(*) from u") == [(0,)]
        await db.close(timeout=0)


async def test_the_error_of_a_statement_is_told_whatever_befalls_its_connection(
    one: PoolManager[Any],
) -> None:
    """It was answered in the turn in which the connection is taken away."""
    query = "select 1 / (%s::int - 1)"
    task = asyncio.create_task(one.fetchval(query, (1,)))
    async with asyncio.timeout(20):
        while not task.done():
            await asyncio.sleep(0)
            for checkout in list(life(one.pool).held):
                if checkout.used:  # all was answered
                    checkout.session.finish()
    with pytest.raises(psycopg.errors.DivisionByZero):
        await task


async def test_an_error_that_came_before_its_connection_was_lost_is_the_statements_own(
    one: PoolManager[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came with it ends there: the statement had an end, and nothing of it is in doubt."""

    def cut_short(pgconn: Any) -> list[list[Any]]:
        answers = received(pgconn)
        errors = [one for one in answers if one[-1].status == FATAL_ERROR]
        if errors:
            pgconn.finish()
        return errors or answers

    monkeypatch.setattr(_lane, "received", cut_short)
    with pytest.raises(psycopg.errors.DivisionByZero) as caught:
        await one.fetchval("select 1 / (%s::int - 1)", (1,))
    assert not hasattr(caught.value, "__notes__")
    assert await one.fetchall(READ) == ROWS


async def test_a_connection_whose_last_answers_are_nobodys_is_given_back(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those behind a slow one were sent elsewhere; what is slow here was looked for, not told."""
    trust(monkeypatch)
    async with PoolManager(table, min_size=2, max_size=2, name="lane", timeout=20) as db:
        await know(db, READ, COUNT)
        async with db.connection():
            with locked(table):
                head = asyncio.create_task(db.fetchall(READ))
                await asyncio.sleep(0)
                behind = asyncio.create_task(db.fetchval(COUNT, (500_000,)))
                await until(lambda: sum(len(one.behind) for one in db.snapshot().checkouts) == 1)
                (lane,) = lanes(db)._all
            lane.move_others()
            pgconn = lane.pgconn
            assert select.select([pgconn.socket], [], [], 20)[0]
            lane.wire.look()  # finds the first answer, before the loop tells of it
        async with asyncio.timeout(20):
            assert await head == ROWS
            assert await behind == 500_000
        await until(lambda: db.pool.counts()["in_use"] == 0)
        assert pgconn.pipeline_status == psycopg.pq.PipelineStatus.OFF


async def test_who_comes_to_a_connection_that_is_lost_in_that_very_turn_is_sent_elsewhere(
    one: PoolManager[Any], table: str
) -> None:
    """The loop has not heard of it yet: whoever sends is the first to know."""
    with locked(table):
        head = asyncio.create_task(one.fetchall(READ))
        await asyncio.sleep(0)
        (checkout,) = life(one.pool).held
        pgconn = checkout.session.pgconn
        kill_sessions(table, "poolkeeper:lane")

        def lost() -> bool:
            with suppress(psycopg.OperationalError):
                pgconn.consume_input()
            return bool(pgconn.status == psycopg.pq.ConnStatus.BAD)

        assert eventually(lost)
        others = [asyncio.create_task(one.fetchall(PLAIN, (n,))) for n in range(20)]
        async with asyncio.timeout(20):
            assert await asyncio.gather(*others) == numbers(20)
        with pytest.raises(psycopg.OperationalError) as caught:
            await head
        assert caught.value.__notes__ == SENT


class CutShort(BaseException):
    """Stands for a KeyboardInterrupt, which would end the test run."""


@pytest.mark.parametrize("error", [CutShort, MemoryError])
@pytest.mark.parametrize("step", ["received", "wake", "sync"])
async def test_who_is_cut_short_in_the_midst_of_it_gives_nobody_the_answer_of_another(
    one: PoolManager[Any], monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    """Whose an answer is, is known by its place: what has got out of step is used no more."""
    owner: Any = {"received": _lane, "wake": Asked, "sync": _lane.Lane}[step]
    name = {"received": "received", "wake": "wake", "sync": "sync"}[step]
    method, called = getattr(owner, name), 0

    def cut_short(*args: Any) -> Any:
        nonlocal called
        called += 1
        if called == 2 and step == "received":
            method(*args)  # what has come is lost
        if called == 2:
            raise error
        return method(*args)

    asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
    for _ in range(5):
        called = 0
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, cut_short)
            tasks = [asyncio.create_task(one.fetchval(PLAIN, (n,))) for n in range(40)]
            async with asyncio.timeout(20):
                ended = await asyncio.gather(*tasks, return_exceptions=True)
        wrong = [type(end) for n, end in enumerate(ended) if end != n]
        assert wrong in ([], [error])  # in the task whose step it was, if it was a task's
        await until(lambda: one.pool.counts()["idle"] == 1)


# --- the pool ------------------------------------------------------------------------------------


async def test_close_at_its_deadline_stops_the_one_at_the_head_and_refuses_who_waits(
    one: PoolManager[Any], table: str
) -> None:
    """As it does with what runs in a block; those behind it get their answers."""
    lane = Lane(one)
    with locked(table):
        await lane.fill(more=5)
        await one.close(timeout=0.1)
        head, *others = await lane.ends()
    assert isinstance(head, psycopg.errors.QueryCanceled)
    assert others[:BEHIND] == numbers(BEHIND)
    assert {type(end) for end in others[BEHIND:]} == {ClosedError}


async def test_close_at_its_deadline_leaves_none_of_sixteen_that_run_long(
    one: PoolManager[Any], table: str
) -> None:
    lane = Lane(one)
    with locked(table):
        await lane.fill(more=5, behind=READ)
        async with asyncio.timeout(20):
            await one.close(timeout=0.1)
        head, *others = await lane.ends()
        query = "select 1 from pg_stat_activity where application_name = 'poolkeeper:lane'"
        assert await asyncio.to_thread(eventually, lambda: not admin(table, query))
    assert isinstance(head, psycopg.errors.QueryCanceled)
    assert {type(end) for end in others} <= {psycopg.errors.QueryCanceled, ClosedError}
    assert {type(end) for end in others[BEHIND:]} == {ClosedError}


async def test_close_ends_what_is_being_stopped_for_nobody_before_that_has_begun(
    one: PoolManager[Any],
) -> None:
    """Nothing of the closed life goes on, and nothing of it is kept."""
    asked = asyncio.create_task(one.fetchval("select pg_sleep(60)"))
    await until(lambda: one.snapshot().in_use)
    await asyncio.sleep(0.1)
    here = weakref.ref(life(one.pool))
    (lane,) = lanes(one)._all
    lane.stop_for_nobody()
    del lane
    await one.close(timeout=0)
    await asyncio.wait({asked})
    assert isinstance(asked.exception(), psycopg.errors.QueryCanceled)
    del asked
    await asyncio.sleep(0.1)
    gc.collect()
    assert here() is None


async def test_a_connection_is_drained_when_all_on_it_were_answered(
    one: PoolManager[Any], table: str
) -> None:
    lane = Lane(one)
    pid = await one.fetchval("select pg_backend_pid()")
    with locked(table):
        await lane.fill(more=5)
        await one.pool.drain()
    assert await lane.ends() == [ROWS, *numbers(BEHIND + 5)]
    assert await one.fetchval("select pg_backend_pid()") != pid


async def test_a_pool_that_is_made_smaller_lets_all_be_answered(
    make_manager: MakeManager, table: str, trusting: None
) -> None:
    db = make_manager(table, min_size=3, max_size=3, timeout=20)
    await db.open()
    await know(db, READ, PLAIN)
    with locked(table):
        heads = [asyncio.create_task(db.fetchall(READ)) for _ in range(3)]
        await asyncio.sleep(0)
        others = [asyncio.create_task(db.fetchall(PLAIN, (n,))) for n in range(60)]
        await asyncio.sleep(0)
        assert [len(row.behind) for row in db.snapshot().checkouts] == [BEHIND] * 3
        await db.pool.resize(1, 1)
    async with asyncio.timeout(20):
        assert await asyncio.gather(*heads) == [ROWS] * 3
        assert await asyncio.gather(*others) == numbers(60)
    await until(lambda: (counts := db.pool.counts())["idle"] == counts["total"] == 1)


async def test_a_stranger_to_the_loop_disturbs_nobody(one: PoolManager[Any], table: str) -> None:
    lane = Lane(one)

    def intrude() -> None:
        with pytest.raises(LoopMismatchError):
            asyncio.run(one.fetchval(PLAIN, (1,)))

    with locked(table):
        await lane.fill(more=5)
        await asyncio.gather(*(asyncio.to_thread(intrude) for _ in range(4)))
    assert await lane.ends() == [ROWS, *numbers(BEHIND + 5)]


# --- the process ---------------------------------------------------------------------------------

FORKS = """
import multiprocessing, signal, threading
import psycopg
from poolkeeper import LoopMismatchError, PoolManager, _lane, _oneshots

signal.alarm(25)  # a hang ends the program, and the test with it
_lane.LONG = _lane.TURN = _oneshots.SLOW = 60.0
dsn, how = sys.argv[1:]
db = PoolManager(dsn, min_size=1, max_size=1, name="orders", timeout=20)
tasks = []


async def ask():
    try:
        await db.fetchval("select %s::int", (1,))
    except LoopMismatchError as ex:
        print("child:", str(ex).splitlines()[0])


def misuse():
    try:
        ask().send(None)  # its thread has the parent's loop on its stack
    except StopIteration:
        pass
    sys.stdout.flush()


async def open_own():
    async with db:
        numbers = range(30)
        got = await asyncio.gather(*(db.fetchval("select %s::int", (n,)) for n in numbers))
        print("child:", got == list(numbers))
    sys.stdout.flush()


def in_child():
    misuse()
    if how == "drops":
        for task in tasks:
            task.get_coro().close()
        tasks.clear()
    elif how == "opens":
        thread = threading.Thread(target=run, args=(open_own(),))
        thread.start()
        thread.join()


async def in_parent():
    if how == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=in_child)
        process.start()
        await asyncio.to_thread(process.join)
        return
    if (pid := os.fork()) == 0:
        in_child()
        os._exit(0)
    await asyncio.to_thread(os.waitpid, pid, 0)


async def main():
    async with db:
        for _ in range(2):
            await db.fetchall("select n from t")
            await db.fetchval("select %s::int", (1,))
        pid = await db.fetchval("select pg_backend_pid()")
        with psycopg.connect(dsn) as blocker:
            blocker.execute("lock table t")
            tasks.append(asyncio.create_task(db.fetchall("select n from t")))
            await asyncio.sleep(0)
            for n in range(15):
                tasks.append(asyncio.create_task(db.fetchval("select %s::int", (n,))))
            await asyncio.sleep(0)
            assert len(db.snapshot().checkouts[0].behind) == 15
            await in_parent()
        head, *others = await asyncio.gather(*tasks)
        assert head == [(1,), (2,), (3,)]
        assert others == list(range(15))
        assert await db.fetchval("select pg_backend_pid()") == pid
        assert db.pool.get_stats().get("returns_bad", 0) == 0
    print("parent went on")


run(main())
"""


@pytest.mark.parametrize("how", ["asks", "drops", "opens", "multiprocessing"])
def test_a_child_has_no_part_in_what_is_under_way_in_its_parent(
    table: str, loop_name: str, how: str
) -> None:
    """It is refused, and sends nothing on the parent's sockets, whatever becomes of the tasks."""
    ended = run_program(textwrap.dedent(FORKS), table, how, loop=loop_name, timeout=40)
    assert (ended.err, ended.code) == ("", 0), ended
    refused = 'child: pool "orders" was opened in another process\n'
    worked = "child: True\n" if how == "opens" else ""
    assert ended.out == f"{refused}{worked}parent went on\n"


# --- the server ----------------------------------------------------------------------------------


@pytest.mark.fault
async def test_a_restart_of_the_server_fails_only_who_it_was_at_work_for(
    make_manager: MakeManager, own_server: EmbeddedServer, trusting: None
) -> None:
    db = make_manager(own_server.dsn(), min_size=1, max_size=1, timeout=30)
    await db.open()
    await know(db, COUNT, PLAIN)
    lane = Lane(db, COUNT, 10**12)
    await lane.fill(more=5)
    await asyncio.to_thread(own_server.restart)
    head, *others = await lane.ends()
    assert isinstance(head, psycopg.errors.AdminShutdown)
    assert head.__notes__ == SENT
    assert others == numbers(BEHIND + 5)


@pytest.mark.fault
async def test_who_shares_and_who_writes_follows_a_fail_over(make_manager: MakeManager) -> None:
    with pair() as servers:
        db = make_manager(servers.dsn("read-write"), min_size=2, max_size=2, timeout=30)
        await db.open()
        where = "select current_setting('port')::int"
        await know(db, PLAIN)
        ports: list[int] = []
        ends = False

        async def read() -> None:
            while not ends:
                assert await db.fetchval(PLAIN, (1,)) == 1
                ports.append(await db.fetchval(where))

        async def write() -> None:
            while not ends:
                with suppress(psycopg.errors.ReadOnlySqlTransaction):  # the first, maybe
                    await db.execute("insert into written values (1)")

        tasks = [asyncio.create_task(read()) for _ in range(32)]
        tasks += [asyncio.create_task(write()) for _ in range(2)]
        await until(lambda: len(ports) > 200)
        await asyncio.to_thread(servers.switch_over)
        await until(lambda: set(ports[-200:]) == {servers.standby.port})
        ends = True
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks)
        await db.execute("insert into written values (2)")
        assert admin(servers.standby.dsn(), "select 1 from written where n = 2")


# --- what the pool itself sends before -----------------------------------------------------------


async def after_a_stream(db: PoolManager[Any]) -> None:
    """Leave a connection to whose next statement libpq may answer row by row."""
    async with db.connection() as conn:
        await conn.set_autocommit(True)
        assert [row async for row in conn.cursor().stream("select 1")] == [(1,)]


async def after_many_texts(db: PoolManager[Any]) -> None:
    """Leave a connection on which a statement is to be forgotten before the next."""
    await db.execute("select 1")
    await db.execute("select 2")


async def prepare_one_statement(conn: Any) -> None:
    conn.prepare_threshold, conn.prepared_max = 0, 1


@pytest.mark.parametrize("before", [after_a_stream, after_many_texts])
async def test_a_write_behind_what_the_pool_sends_itself_is_sent_once_on_a_slow_network(
    before: Callable[[PoolManager[Any]], Any],
    make_manager: MakeManager,
    table: str,
    proxy: FaultProxy,
) -> None:
    """Only plain reads may be sent twice, whatever is at the head."""
    proxy.lead_to(table)
    dsn = psycopg.conninfo.make_conninfo(
        proxy.dsn, dbname=psycopg.conninfo.conninfo_to_dict(table)["dbname"]
    )
    db = make_manager(dsn, min_size=1, max_size=2, configure=prepare_one_statement)
    await db.open()
    for n in range(10, 13):
        await before(db)
        with proxy.slow(0.05):
            await db.execute("insert into t values (%s)", (n,))
    assert await db.fetchval("select count(*) from t where n >= 10") == 3


async def test_close_waits_for_a_server_that_stops_one_after_the_other(
    make_manager: MakeManager, table: str, trusting: None
) -> None:
    """Sixteen that wait for a lock, each of them to be asked for, take more than one's grace."""
    kwargs = {"prepare_threshold": None}  # else they fail together, with the one that prepares
    db = make_manager(table, min_size=1, max_size=1, name="slowly", kwargs=kwargs)
    await db.open()
    await know(db, READ)
    lane = Lane(db)
    with locked(table):
        await lane.fill(behind=READ)
        await db.close(timeout=0.1)
        query = "select 1 from pg_stat_activity where application_name = 'poolkeeper:slowly'"
        assert await asyncio.to_thread(eventually, lambda: not admin(table, query))
    assert {type(end) for end in await lane.ends()} == {psycopg.errors.QueryCanceled}
