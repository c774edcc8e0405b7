"""Opening again: on the same loop, on a new one, after a loop that died, in a forked child."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from poolkeeper import (
    BoundPool,
    ClosedError,
    LoopMismatchError,
    NotOpenError,
    PoolManager,
    ReleasedConnectionError,
)
from tests.support.programs import run_program
from tests.support.server import kill_sessions
from tests.support.waiting import eventually

MakeManager = Callable[..., PoolManager[Any]]
CountSessions = Callable[[str], int]

TIMES = 100

USE = """
async def use(db):
    async with db.connection() as conn:
        await conn.execute("select 1")
    assert await db.fetchval("select 42") == 42
    assert db.pool.counts() == {"total": 2, "in_use": 0, "idle": 2, "max": 2, "waiting": 0}
    stats = db.pool.get_stats()
    assert stats["connections_num"] == 2, stats
    assert stats["requests_num"] == 2, stats
"""


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def ours() -> Counter[str]:
    """Count the objects of our classes, and of psycopg's, that are alive."""
    gc.collect()
    names = (type(thing).__qualname__ for thing in gc.get_objects() if _is_ours(type(thing)))
    return Counter(names)


def _is_ours(cls: type) -> bool:
    module = getattr(cls, "__module__", None)
    return isinstance(module, str) and module.split(".")[0] in (
        "poolkeeper",
        "psycopg",
        "psycopg_pool",
    )


async def use(manager: PoolManager[Any]) -> None:
    """Use *manager* and look at its numbers, which are those of this life only."""
    async with manager.connection() as conn:
        await conn.execute("select 1")
    assert await manager.fetchval("select 42") == 42
    assert manager.pool.counts()["total"] == manager.pool.counts()["idle"] == 2
    stats = manager.pool.get_stats()
    assert stats["connections_num"] == stats["pool_size"] == stats["requests_num"] == 2


async def test_a_hundred_times_on_the_same_loop_nothing_grows(
    make_manager: MakeManager, server_sessions: CountSessions
) -> None:
    manager = make_manager(min_size=2, name="again")
    pool = manager.pool
    for _ in range(3):
        async with manager:
            await use(manager)
    before = ours(), descriptors(), asyncio.all_tasks()
    for _ in range(TIMES):
        async with manager:
            assert manager.state == "open"
            await use(manager)
        assert manager.state == "closed"
        assert manager.pool is pool
    # Timers of the last waits, cancelled or not, keep the context in which they began, and with
    # it the attempt to connect that it was of, until their time has come.
    await asyncio.sleep(1.0)
    assert ours() - before[0] == Counter()
    assert descriptors() <= before[1]
    assert asyncio.all_tasks() == before[2]
    assert eventually(lambda: server_sessions("poolkeeper:again") == 0)


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "abandoned"])
def test_a_hundred_times_on_a_new_loop_nothing_grows(
    dsn: str, server_sessions: CountSessions, loop_name: str, closes: bool
) -> None:
    """Also where every loop dies with the pool open; then the last life is all there is."""
    manager = PoolManager(dsn, min_size=2, name="loops")

    async def live() -> None:
        await manager.open()
        await use(manager)
        if closes:
            await manager.close()

    def run() -> None:
        if loop_name == "uvloop":
            import uvloop

            uvloop.run(live())
        else:
            asyncio.run(live())

    for _ in range(3):
        run()
    before = ours(), descriptors()
    for _ in range(TIMES):
        run()
    assert ours() - before[0] == Counter()
    assert descriptors() <= before[1]
    assert eventually(lambda: server_sessions("poolkeeper:loops") == (0 if closes else 2))
    asyncio.run(manager.open())
    with contextlib.suppress(LoopMismatchError):
        asyncio.run(manager.close())
    assert eventually(lambda: server_sessions("poolkeeper:loops") == 0)


async def test_lives_that_fail_leave_nothing_that_grows(
    make_manager: MakeManager, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "psycopg.pool")  # what pytest captures keeps the errors alive
    manager = make_manager(psycopg.conninfo.make_conninfo(dsn, dbname="no_such_db"))

    async def fail() -> None:
        with pytest.raises(psycopg.OperationalError):
            await manager.open()

    for _ in range(3):
        await fail()
    before = ours(), descriptors(), asyncio.all_tasks()
    for _ in range(30):
        await fail()
    # The last life's retries, more or fewer of them, stay until the next one begins.
    growth = ours() - before[0]
    assert max(growth.values(), default=0) < 10, growth
    assert descriptors() <= before[1]
    assert asyncio.all_tasks() == before[2]


@pytest.mark.parametrize("forgets", ["", "first", "both"])
@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_a_program_runs_twice_with_one_manager(
    dsn: str, loop_name: str, forgets: str, debug: bool
) -> None:
    """Also if it forgets to close: the life of a loop that is gone is abandoned in silence."""
    ended = run_program(
        f"""
        import gc, warnings
        warnings.simplefilter("error")
        from poolkeeper import PoolManager

        db = PoolManager(sys.argv[1], min_size=2, name="twice")
        {USE.replace(chr(10), chr(10) + " " * 8)}

        async def main(close):
            await db.open()
            await use(db)
            if close:
                await db.close()
            print(db.state)

        run(main({forgets == ""}), debug={debug})
        gc.collect()
        print(db.state)
        run(main({forgets != "both"}), debug={debug})
        gc.collect()
        print(db.state)
        """,
        dsn,
        loop=loop_name,
    )
    states = {
        "": ["closed", "closed", "closed", "closed"],
        "first": ["open", "closed", "closed", "closed"],
        "both": ["open", "closed", "open", "closed"],
    }
    assert (ended.code, ended.out.split(), ended.err) == (0, states[forgets], "")


@pytest.mark.parametrize("at", ["a query", "a release", "a wait", "opening", "close"])
def test_a_life_that_ended_in_the_middle_of_something_is_abandoned_in_silence(
    dsn: str, loop_name: str, at: str
) -> None:
    """As a notebook does, or a test framework: the loop is stopped, its tasks are not ended."""
    ended = run_program(
        f"""
        import gc, warnings
        warnings.simplefilter("error")
        from poolkeeper import PoolManager
        at = {at!r}

        async def reset(conn):
            if at == "a release":
                await conn.execute("select pg_sleep(60)")

        db = PoolManager(sys.argv[1], min_size=2, name="middle", reset=reset)

        async def first():
            await db.open(wait=at != "opening")
            if at == "a query":
                task(db.fetchval("select pg_sleep(60)"))
            elif at == "a release":
                task(db.fetchval("select 1"))
            elif at == "a wait":
                task(db.fetchval("select pg_sleep(60)"))
                task(db.fetchval("select pg_sleep(60)"))
                task(db.fetchval("select 1"))
            elif at == "close":
                task(db.fetchval("select pg_sleep(60)"))
                await asyncio.sleep(0.05)
                task(db.close(timeout=30))
            await asyncio.sleep(0.05)

        def task(work):
            task = asyncio.get_running_loop().create_task(work)
            task._log_destroy_pending = False  # the program's own, not what is tested
            tasks.append(task)

        tasks = []

        async def second():
            global at
            at = ""
            async with db:
                assert await db.fetchval("select 42") == 42
                while (counts := db.pool.counts()).get("returning"):  # nobody waits for reset
                    await asyncio.sleep(0.01)
                assert counts["total"] == counts["idle"] == 2, counts

        async def make_loop():
            return type(asyncio.get_running_loop())

        loop = run(make_loop())()
        loop.run_until_complete(first())
        loop.close()
        assert db.state == "closed"
        run(second())
        run(second())
        del loop
        for task in tasks:
            try:
                task.get_coro().close()
            except RuntimeError:
                pass  # its loop is closed
        tasks.clear()
        del task
        gc.collect()
        print("ended")
        """,
        dsn,
        loop=loop_name,
    )
    said = ended.err
    if "wait_for(" in inspect.getsource(psycopg.waiting):
        # psycopg 3.3.0 waits in steps of 0.1 s. Each makes one more task on Python 3.11; on 3.12
        # it is cancelled and taken back, and the program's own I/O goes on in a task of ours,
        # which ends with the program's. Nobody else knows of these.
        said = re.sub(
            r"Task was destroyed[^\n]*\n(?:source_traceback(?:(?!Task was destroyed).)*?\n)?"
            r"task: <Task [^\n]*(?:=<Event\.wait\(\)|=<_drive\(\))[^\n]*\n",
            "",
            said,
            flags=re.DOTALL,
        )
        said = re.sub(
            r"Exception ignored in: <coroutine object _drive [^\n]*\n"
            r"(?:(?!Exception ignored).)*?"
            r"RuntimeError: cannot reuse already awaited coroutine\n",
            "",
            said,
            flags=re.DOTALL,
        )
    assert (ended.code, ended.out, said) == (0, "ended\n", "")


async def test_the_pool_handed_out_before_it_was_open_is_always_the_same(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(min_size=2)
    pool = manager.pool
    assert isinstance(pool, BoundPool)
    with pytest.raises(NotOpenError):
        await pool.getconn()
    for _ in range(3):
        await manager.open()
        conn = await pool.getconn()
        cursor = await conn.execute("select 42")
        assert await cursor.fetchone() == (42,)
        await conn.commit()
        await pool.putconn(conn)
        await manager.close()
        with pytest.raises(ClosedError):
            await pool.getconn()
    assert manager.pool is pool


async def test_settings_and_sizes_are_as_before(make_manager: MakeManager, dsn: str) -> None:
    configured = []

    async def configure(conn: Any) -> None:
        await conn.set_autocommit(True)
        configured.append(conn)

    def conninfo() -> str:
        return dsn

    manager = make_manager(
        conninfo,
        kwargs=lambda: {"connect_timeout": 7},
        min_size=2,
        max_size=5,
        configure=configure,
        name="same",
        timeout=3,
    )
    for life in range(1, 4):
        async with manager:
            pool = manager.pool
            assert (pool.name, pool.min_size, pool.max_size, pool.timeout) == ("same", 2, 5, 3)
            assert len(configured) == 2 * life
            async with manager.connection() as conn:
                assert conn.autocommit
                assert conn.info.get_parameters()["connect_timeout"] == "7"
                assert conn.info.parameter_status("application_name") == "poolkeeper:same"
            await pool.resize(3, 4)  # of this life


async def test_a_connection_of_an_earlier_life_is_refused(make_manager: MakeManager) -> None:
    manager = make_manager(min_size=1)
    await manager.open()
    async with manager.connection() as returned:
        pass
    held = await manager.pool.getconn()
    await manager.close(timeout=0)
    await manager.open()
    with pytest.raises(ReleasedConnectionError):
        await returned.execute("select 1")
    with pytest.raises(ClosedError, match="was closed while this connection was in use"):
        await held.execute("select 1")
    assert await manager.fetchval("select 42") == 42


def test_a_connection_of_a_dead_loop_cannot_come_back(dsn: str) -> None:
    manager = PoolManager(dsn, min_size=1)

    async def first() -> Any:
        await manager.open()
        return await manager.pool.getconn()

    async def second(conn: Any) -> None:
        async with manager:
            await manager.pool.putconn(conn)  # its pool has taken it back already
            with pytest.raises(ClosedError):
                await conn.execute("select 1")
            assert await manager.fetchval("select 42") == 42
            assert manager.pool.counts()["total"] == 1

    asyncio.run(second(asyncio.run(first())))


async def test_callbacks_that_outlive_their_life_are_of_no_concern_to_the_next(
    make_manager: MakeManager,
) -> None:
    """They take no notice of being cancelled: as many connections as before, and no failure."""
    goes_on = asyncio.Event()
    goes_on.set()

    async def stubborn(_conn: Any) -> None:
        while not goes_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await goes_on.wait()

    manager = make_manager(min_size=1, max_size=2, configure=stubborn, reset=stubborn, timeout=10)
    await manager.open()

    async def until_in(callback: str) -> None:
        async with asyncio.timeout(10):
            while callback not in [step.doing for step in manager.snapshot().steps]:
                await asyncio.sleep(0.01)

    goes_on.clear()
    async with manager.connection():
        second = asyncio.create_task(manager.fetchval("select 1"))  # makes the pool grow
        await until_in("in the configure callback")
        second.cancel()
    await until_in("in the reset callback")
    await manager.close(timeout=0)
    opening = asyncio.create_task(manager.open())
    await until_in("in the configure callback")
    goes_on.set()
    await opening
    await asyncio.sleep(0.2)
    assert manager.pool.counts() == {"total": 1, "in_use": 0, "idle": 1, "max": 2, "waiting": 0}
    assert manager.snapshot().connecting == 0


async def test_reopening_after_the_server_ended_the_sessions(
    make_manager: MakeManager, dsn: str
) -> None:
    manager = make_manager(min_size=2, name="killed")
    await manager.open()
    assert kill_sessions(dsn, "poolkeeper:killed") == 2
    await manager.close()
    await manager.open()
    assert await manager.fetchval("select 42") == 42


# --- fork ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [True, False], ids=["in a running loop", "between runs"])
def test_a_forked_child_opens_its_own_pool_and_the_parent_keeps_its_own(
    dsn: str, loop_name: str, running: bool
) -> None:
    """Two generations of children, one that exits as usual and one that ends hard."""
    ended = run_program(
        f"""
        import gc, warnings
        warnings.simplefilter("error")
        from poolkeeper import LoopMismatchError, PoolManager

        db = PoolManager(sys.argv[1], min_size=2, max_size=2, name="family")

        async def pids():
            async with db.connection() as one, db.connection() as two:
                rows = [await (await c.execute("select pg_backend_pid()")).fetchone()
                        for c in (one, two)]
            return {{row[0] for row in rows}}

        async def child_main(inherited):
            assert db.state == "closed", db.state
            try:
                await db.fetchval("select 1")
            except LoopMismatchError as error:
                assert "was opened in another process" in str(error)
            else:
                raise AssertionError("used the parent's pool")
            async with db:
                own = await pids()
                assert len(own) == 2 and not own & inherited, (own, inherited)
                assert db.pool.counts()["total"] == 2
                try:
                    await db.pool.putconn(held[0])
                except LoopMismatchError:
                    pass
                else:
                    raise AssertionError("took the parent's connection")
            gc.collect()

        def fork(inherited, hard):
            child = os.fork()
            if child:
                return child
            try:
                asyncio._set_running_loop(None)
                run(child_main(inherited))
                code = 0
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 1
            if hard:
                os._exit(code)
            if {running}:
                # Out of the parent's coroutine and loop without running either.
                gc.collect()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            sys.exit(code)

        def check(child):
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0, status

        held = []

        async def parent():
            await db.open()
            before = await pids()
            held.append(await db.pool.getconn())
            if {running}:
                for hard in (False, True):
                    check(fork(before, hard))
            await db.pool.putconn(held.pop())
            return before

        async def parent_after(before):
            assert await pids() == before
            for _ in range(20):
                assert await db.fetchval("select 42") == 42
            await db.close()

        async def make_loop():
            return type(asyncio.get_running_loop())

        loop = run(make_loop())()
        before = loop.run_until_complete(parent())
        if not {running}:
            held.append(loop.run_until_complete(db.pool.getconn()))
            for hard in (False, True):
                check(fork(before, hard))
            loop.run_until_complete(db.pool.putconn(held.pop()))
        loop.run_until_complete(parent_after(before))
        loop.close()
        print("parent ended")
        """,
        dsn,
        loop=loop_name,
    )
    assert (ended.code, ended.out, ended.err) == (0, "parent ended\n", "")
