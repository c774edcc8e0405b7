"""A program that fails or ends while the pool is at work ends at once, with its own error."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from poolkeeper._embedded import free_port
from tests.support.programs import Ended, run_program
from tests.support.proxy import FaultProxy

Program = Callable[..., None]

AT_ONCE = 25.0  # seconds, of a whole program; the patience of what it waits for is 30
"""Seconds for a whole program, its start included; what it must not wait for takes 30 or more."""

RUNS = 10

PRELUDE = """
import gc, logging, time, warnings
from poolkeeper import PoolManager
warnings.simplefilter("error")
dsn = sys.argv[1]
longest = 0.0

class Own(Exception):
    pass

# Dropped while its loop goes on, a manager would warn that it was never closed.
held = []

def many(main, times):
    # As asyncio.run() is used in a program, over and over, since what is tested is a race.
    global longest
    for turn in range(times):
        begin = time.monotonic()
        try:
            run(main(turn))
        except Own:
            pass
        else:
            assert turn % 2, "the program's own exception was lost"
        longest = max(longest, time.monotonic() - begin)

def end(turn):
    # Even turns raise, odd ones simply end.
    if turn % 2 == 0:
        raise Own("my own")
"""

EPILOGUE = """
gc.collect()
assert longest < 10, f"one run took {longest:.1f} s"
print("ended")
"""


@pytest.fixture
def silent_dsn(dsn: str) -> Iterator[str]:
    """A server that accepts connections and says nothing."""
    proxy = FaultProxy(dsn)
    proxy.silent = True
    proxy.start()
    yield proxy.dsn
    proxy.stop()


def clean(ended: Ended) -> None:
    """Fail unless the program came to its end, in time, and said nothing on the way."""
    assert (ended.code, ended.out, ended.err) == (0, "ended\n", "")


@pytest.fixture
def program(loop_name: str) -> Program:
    """Run the main() of a program many times, raising and ending in turns."""

    def run(main: str, *arguments: str, times: int = RUNS) -> None:
        source = PRELUDE + main + f"\nmany(main, {times})\n" + EPILOGUE
        clean(run_program(source, *arguments, loop=loop_name, timeout=60))

    return run


# --- the bare pool ------------------------------------------------------------------------------


def test_with_the_bare_pool_a_failing_program_hangs(silent_dsn: str) -> None:
    """What all this is about. If it passes one day, much of _compat can go."""
    ended = run_program(
        """
        from psycopg_pool import AsyncConnectionPool

        async def main():
            pool = AsyncConnectionPool(sys.argv[1], open=False)
            await pool.open()
            await asyncio.sleep(0.2)
            raise SystemError("my own")

        run(main())
        """,
        silent_dsn,
        timeout=3,
    )
    assert ended.code is None
    assert "my own" not in ended.err


# --- its own error, at once -----------------------------------------------------------------------


@pytest.mark.parametrize("wait", [True, False])
def test_a_program_that_raises_while_opening_shows_its_own_exception(
    silent_dsn: str, loop_name: str, wait: bool
) -> None:
    ended = run_program(
        f"""
        from poolkeeper import PoolManager

        db = PoolManager(sys.argv[1])

        async def main():
            opening = asyncio.create_task(db.open(wait={wait}))
            await asyncio.sleep(0.3)
            raise SystemError("my own")

        run(main())
        """,
        silent_dsn,
        loop=loop_name,
    )
    assert ended.seconds < AT_ONCE
    assert ended.code == 1
    assert ended.err.splitlines()[0] == "Traceback (most recent call last):"
    assert ended.err.splitlines()[-1] == "SystemError: my own"
    assert ended.err.count("Traceback") == 1


def test_ctrl_c_while_opening_ends_the_program(silent_dsn: str, loop_name: str) -> None:
    ended = run_program(
        """
        import signal, threading, time
        from poolkeeper import PoolManager

        db = PoolManager(sys.argv[1])

        async def main():
            asyncio.get_running_loop().call_later(0.5, os.kill, os.getpid(), signal.SIGINT)
            async with db:
                print("open")

        try:
            run(main())
        except KeyboardInterrupt:
            print("interrupted", db.state)
        """,
        silent_dsn,
        loop=loop_name,
    )
    assert ended.seconds < AT_ONCE
    assert (ended.code, ended.out, ended.err) == (0, "interrupted closed\n", "")


# --- in every phase ------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, 0.02, 0.2])
@pytest.mark.parametrize("how", ["open()", "open(wait=False)"])
def test_opening_a_silent_server(
    program: Program, silent_dsn: str, how: str, seconds: float
) -> None:
    program(
        f"""
async def main(turn):
    db = PoolManager(dsn)
    held.append(db)
    opening = asyncio.create_task(db.{how})
    await asyncio.sleep({seconds})
    end(turn)
""",
        silent_dsn,
    )


@pytest.mark.parametrize("how", ["open()", "open(wait=False)"])
def test_opening_where_nobody_listens(program: Program, how: str) -> None:
    program(
        f"""
logging.getLogger("poolkeeper").setLevel("CRITICAL")
async def main(turn):
    db = PoolManager(dsn)
    held.append(db)
    opening = asyncio.create_task(db.{how})
    await asyncio.sleep(turn * 0.04)
    end(turn)
""",
        f"postgresql://postgres@127.0.0.1:{free_port()}/postgres",
    )


def test_opening_a_healthy_server_without_waiting(program: Program, dsn: str) -> None:
    program(
        """
async def main(turn):
    db = PoolManager(dsn)
    await db.open(wait=False)
    until = time.monotonic() + turn / 1000
    while time.monotonic() < until:
        await asyncio.sleep(0)
    held.append(db)
    end(turn)
""",
        dsn,
        times=40,
    )


def test_ending_at_any_turn_of_the_loop(program: Program, dsn: str) -> None:
    program(
        """
async def main(turn):
    db = PoolManager(dsn, min_size=2)
    await db.open(wait=False)
    held.append(db)
    for _ in range(turn):
        await asyncio.sleep(0)
    end(turn)
""",
        dsn,
        times=60,
    )


GROWING = """
async def main(turn):
    db = PoolManager(dsn, min_size=1, max_size=4, configure=configure)
    held.append(db)
    await db.open()
    fault()
    async def query():
        async with db.connection() as conn:
            await asyncio.sleep(60)
    tasks = [asyncio.create_task(query()) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert db.pool.counts()["in_use"] == 1, db
    end(turn)
"""


def test_growing_on_a_server_that_fell_silent(program: Program, dsn: str) -> None:
    program(
        PROXY
        + """
configure = None
def fault():
    proxy.silent = True
"""
        + GROWING.replace("await db.open()", "proxy.silent = False; await db.open()"),
        dsn,
    )


def test_growing_while_configure_is_at_work(program: Program, dsn: str) -> None:
    program(
        """
slow = False
async def configure(conn):
    await conn.set_autocommit(True)
    if slow:
        await conn.execute("select pg_sleep(60)")
def fault():
    global slow
    slow = True
"""
        + GROWING.replace("await db.open()", "global slow; slow = False; await db.open()"),
        dsn,
    )


PROXY = """
from tests.support.proxy import FaultProxy
proxy = FaultProxy(dsn)
proxy.start()
dsn = proxy.dsn
logging.getLogger("psycopg").setLevel("CRITICAL")
"""


@pytest.mark.parametrize("how", ["open()", "open(wait=False)"])
def test_configuring_on_a_server_that_fell_silent(program: Program, dsn: str, how: str) -> None:
    """Cancelling its query gets no answer either."""
    program(
        PROXY
        + f"""
async def configure(conn):
    proxy.stall()
    configuring.set()
    await conn.execute("select 1")
    await conn.commit()

async def main(turn):
    global configuring
    configuring = asyncio.Event()
    proxy.resume()
    db = PoolManager(dsn, min_size=2, configure=configure)
    held.append(db)
    opening = asyncio.create_task(db.{how})
    await configuring.wait()
    await asyncio.sleep(0.1)
    assert db.state == "opening"
    end(turn)
""",
        dsn,
        times=2,
    )


def test_reconnecting_to_a_server_that_refuses(program: Program, dsn: str) -> None:
    program(
        PROXY
        + """
logging.getLogger("poolkeeper").setLevel("CRITICAL")
async def main(turn):
    proxy.refuse = False
    db = PoolManager(dsn, min_size=2)
    held.append(db)
    await db.open()
    proxy.refuse = True
    proxy.cut()
    for _ in range(2):
        try:
            await db.fetchval("select 1", timeout=0.1)
        except Exception:
            pass
    waiting = asyncio.create_task(db.fetchval("select 1"))
    await asyncio.sleep(turn * 0.05)
    end(turn)
""",
        dsn,
    )


def test_giving_back_a_connection_of_a_server_that_fell_silent(program: Program, dsn: str) -> None:
    """The rollback gets no answer, and cancelling it neither."""
    program(
        PROXY
        + """
async def main(turn):
    proxy.resume()
    db = PoolManager(dsn, min_size=1)
    held.append(db)
    await db.open()
    conn = await db.pool.getconn()
    await conn.execute("select 1")
    proxy.stall()
    releasing = asyncio.create_task(db.pool.putconn(conn))
    await asyncio.sleep(0.1)
    assert not releasing.done()
    end(turn)
""",
        dsn,
        times=2,
    )


def test_a_reset_callback_at_work(program: Program, dsn: str) -> None:
    program(
        """
async def reset(conn):
    await conn.set_autocommit(True)
    at_work.set()
    await conn.execute("select pg_sleep(60)")

async def main(turn):
    global at_work
    at_work = asyncio.Event()
    db = PoolManager(dsn, min_size=1, reset=reset)
    held.append(db)
    await db.open()
    releasing = asyncio.create_task(db.fetchval("select 1"))
    await at_work.wait()
    await asyncio.sleep(0.05)
    end(turn)
logging.getLogger("psycopg.pool").setLevel("CRITICAL")
""",
        dsn,
    )


def test_connections_still_held(program: Program, dsn: str) -> None:
    program(
        """
async def main(turn):
    db = PoolManager(dsn, min_size=3)
    held.append(db)
    await db.open()
    async def query():
        async with db.connection() as conn:
            await conn.execute("select pg_sleep(60)")
    async def idle():
        async with db.transaction() as conn:
            await conn.execute("select 1")
            await asyncio.sleep(60)
    tasks = [asyncio.create_task(query()), asyncio.create_task(idle())]
    held.append(await db.pool.getconn())
    while len(db.pool.checkouts()) < 3:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    end(turn)
logging.getLogger("psycopg.pool").setLevel("CRITICAL")
""",
        dsn,
    )


def test_a_close_under_way(program: Program, dsn: str) -> None:
    program(
        """
async def main(turn):
    db = PoolManager(dsn, min_size=2)
    await db.open()
    task = asyncio.create_task(db.fetchval("select pg_sleep(60)"))
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(db.close(timeout=30))
    await asyncio.sleep(0.05)
    held.append((db, task, closing))
    end(turn)
logging.getLogger("poolkeeper").setLevel("CRITICAL")
many(main, 6)
assert all(db.state == "closed" for db, task, closing in held)
assert all(closing.cancelled() for db, task, closing in held)
""",
        dsn,
        times=0,
    )


def test_a_close_in_a_finally_block_after_the_program_failed(program: Program, dsn: str) -> None:
    program(
        """
async def main(turn):
    async with PoolManager(dsn, min_size=2, close_timeout=0.2) as db:
        task = asyncio.create_task(db.fetchval("select pg_sleep(60)"))
        await asyncio.sleep(0.05)
        held.append(task)
        end(turn)
logging.getLogger("poolkeeper").setLevel("CRITICAL")
many(main, 6)
import psycopg
assert all(isinstance(task.exception(), psycopg.errors.QueryCanceled) for task in held)
""",
        dsn,
        times=0,
    )
