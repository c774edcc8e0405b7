"""A forked child can neither use nor harm what its parent opened, and can open its own."""

from __future__ import annotations

import textwrap

import pytest

from tests.support.programs import Ended, run_program

# What each program starts with. The child writes one line for each thing it tried.
PRELUDE = """
import multiprocessing, signal, time
import psycopg
from poolkeeper import LoopMismatchError, PoolManager

signal.alarm(25)  # a hang ends the program, and the test with it
dsn = sys.argv[1]
db = PoolManager(dsn, min_size=2, max_size=2, name="orders", timeout=5)
held = []


async def begin():
    await db.open()
    held.append(await db.pool.getconn())
    await held[0].execute("create temp table mine (n int)")


async def pids():
    async with db.connection() as other:
        return sorted((held[0].info.backend_pid, other.info.backend_pid))


async def go_on(before):
    # The parent's checkout is in its transaction still, and its sessions are the same.
    assert await pids() == before, "other sessions"
    await held[0].execute("insert into mine values (1)")
    await held[0].commit()
    await db.pool.putconn(held[0])
    assert db.pool.get_stats()["connections_num"] == 2, "connections were replaced"
    for _ in range(20):
        assert await db.fetchval("select 42") == 42
    await db.close()
    print("parent went on")


async def attempt(what, operation):
    try:
        result = operation()
        if hasattr(result, "__await__"):
            await result
    except LoopMismatchError as ex:
        print(what, "refused:", str(ex).splitlines()[0])
        return ex
    else:
        print(what, "NOT REFUSED")


async def misuse():
    conn = held[0]
    error = await attempt("acquire", lambda: db.pool.getconn())
    print(str(error).splitlines()[1])
    print(str(error).splitlines()[2])
    await attempt("connection", lambda: db.connection().__aenter__())
    await attempt("fetchval", lambda: db.fetchval("select 1"))
    await attempt("execute", lambda: conn.execute("select 1"))
    await attempt("commit", lambda: conn.commit())
    await attempt("rollback", lambda: conn.rollback())
    await attempt("cancel", lambda: conn.cancel())
    await attempt("cancel_safe", lambda: conn.cancel_safe())
    await attempt("conn.close", lambda: conn.close())
    await attempt("release", lambda: db.pool.putconn(conn))
    await attempt("resize", lambda: db.pool.resize(1, 1))
    await attempt("drain", lambda: db.pool.drain())
    await attempt("check", lambda: db.pool.check())
    await attempt("close", lambda: db.close())
    print("state", db.state)
    sys.stdout.flush()


async def open_own():
    theirs = held[0].info.backend_pid
    async with db:
        own = await db.fetchval("select pg_backend_pid()")
        assert own != theirs, "the parent's session"
        assert await db.fetchval("select 43") == 43
        await attempt("old connection", lambda: held[0].execute("select 1"))
    async with db:
        assert await db.fetchval("select 44") == 44
    print("child works", db.state)
    sys.stdout.flush()


def reap(pid):
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print("child ended", status)


def flush():
    sys.stdout.flush()
    sys.stderr.flush()
"""

REFUSED = [
    "acquire",
    "connection",
    "fetchval",
    "execute",
    "commit",
    "rollback",
    "cancel",
    "cancel_safe",
    "conn.close",
    "release",
    "resize",
    "drain",
    "check",
    "close",
]


def run_fork(body: str, dsn: str, loop_name: str) -> Ended:
    ended = run_program(
        textwrap.dedent(PRELUDE) + textwrap.dedent(body), dsn, loop=loop_name, timeout=40
    )
    assert ended.err == "", ended.err
    assert ended.code == 0, ended
    assert ended.seconds < 20
    return ended


def assert_all_refused(out: str) -> None:
    for what in REFUSED:
        assert f'{what} refused: pool "orders" was opened in another process\n' in out, what
    assert "NOT REFUSED" not in out
    assert "DETAIL:  Opened at <string>:" in out
    assert " Used at <string>:" in out
    assert "HINT:  Open the pool in each process, after the fork: await manager.open()." in out
    assert "state closed\n" in out


LEAVES = pytest.mark.parametrize("leave", ["sys.exit(0)", "os._exit(0)"])


@LEAVES
def test_a_child_of_a_parent_whose_loop_rests_is_refused_everything(
    leave: str, dsn: str, loop_name: str
) -> None:
    ended = run_fork(
        f"""
        loop = {new_loop(loop_name)}
        loop.run_until_complete(begin())
        before = loop.run_until_complete(pids())
        flush()
        if (pid := os.fork()) == 0:
            asyncio.run(misuse())
            flush()
            {leave}
        reap(pid)
        loop.run_until_complete(go_on(before))
        loop.close()
        """,
        dsn,
        loop_name,
    )
    assert_all_refused(ended.out)
    assert ended.out.endswith("child ended 0\nparent went on\n")


@LEAVES
def test_a_child_of_a_parent_whose_loop_rests_opens_its_own(
    leave: str, dsn: str, loop_name: str
) -> None:
    ended = run_fork(
        f"""
        loop = {new_loop(loop_name)}
        loop.run_until_complete(begin())
        before = loop.run_until_complete(pids())
        flush()
        if (pid := os.fork()) == 0:
            run(open_own())
            flush()
            {leave}
        reap(pid)
        loop.run_until_complete(go_on(before))
        loop.close()
        """,
        dsn,
        loop_name,
    )
    assert 'old connection refused: pool "orders" was opened in another process' in ended.out
    assert ended.out.endswith("child works closed\nchild ended 0\nparent went on\n")


def test_a_child_of_a_running_loop_is_refused_everything(dsn: str, loop_name: str) -> None:
    """
    The child drives its coroutine by hand: it has the parent's loop on its stack.

    It leaves by os._exit(), as it must: to go back into the copy of a running loop is to work on
    the parent's selector, whatever the pool does.
    """
    ended = run_fork(
        """
        async def main():
            await begin()
            before = await pids()
            flush()
            if (pid := os.fork()) == 0:
                try:
                    misuse().send(None)
                except StopIteration:
                    pass
                flush()
                os._exit(0)
            await asyncio.to_thread(reap, pid)
            await go_on(before)

        run(main())
        """,
        dsn,
        loop_name,
    )
    assert_all_refused(ended.out)
    assert ended.out.endswith("child ended 0\nparent went on\n")


def test_a_child_of_a_running_loop_opens_its_own_on_a_new_loop(dsn: str, loop_name: str) -> None:
    """In a thread of the child's own, since its main thread is inside the parent's loop."""
    ended = run_fork(
        """
        import threading

        async def main():
            await begin()
            before = await pids()
            flush()
            if (pid := os.fork()) == 0:
                thread = threading.Thread(target=run, args=(open_own(),))
                thread.start()
                thread.join()
                flush()
                os._exit(0)
            await asyncio.to_thread(reap, pid)
            await go_on(before)

        run(main())
        """,
        dsn,
        loop_name,
    )
    assert ended.out.endswith("child works closed\nchild ended 0\nparent went on\n")


def test_an_exception_in_a_child_is_not_replaced_by_ours(dsn: str, loop_name: str) -> None:
    """It unwinds through the blocks that the parent entered, which are not the child's to end."""
    ended = run_fork(
        """
        class Leave(BaseException):
            pass

        async def work():
            async with db:
                async with db.connection() as conn:
                    await conn.execute("select 1")
                    pid = conn.info.backend_pid
                    flush()
                    if (child := os.fork()) == 0:
                        raise Leave
                    await asyncio.to_thread(reap, child)
                    await conn.execute("select 1")
                    assert conn.info.backend_pid == pid
            print("parent went on")

        async def main():
            try:
                await work()
            except Leave:
                print("child left with its own exception")
                flush()
                os._exit(0)

        run(main())
        """,
        dsn,
        loop_name,
    )
    assert ended.out == "child left with its own exception\nchild ended 0\nparent went on\n"


@pytest.mark.parametrize("target", ["misuse", "open_own"])
def test_multiprocessing_with_fork_is_refused_or_opens_its_own(
    target: str, dsn: str, loop_name: str
) -> None:
    ended = run_fork(
        f"""
        def work():
            asyncio.run({target}())

        loop = {new_loop(loop_name)}
        loop.run_until_complete(begin())
        before = loop.run_until_complete(pids())
        flush()
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join()
        print("child ended", process.exitcode)
        loop.run_until_complete(go_on(before))
        loop.close()
        """,
        dsn,
        loop_name,
    )
    if target == "misuse":
        assert_all_refused(ended.out)
    else:
        assert "child works closed\n" in ended.out
    assert ended.out.endswith("child ended 0\nparent went on\n")


def test_the_parent_works_while_its_children_open_use_and_end(dsn: str, loop_name: str) -> None:
    """Several children at once, each with queries of its own, and no row ends up in another."""
    ended = run_fork(
        f"""
        loop = {new_loop(loop_name)}
        loop.run_until_complete(begin())
        before = loop.run_until_complete(pids())
        flush()

        async def many(mark):
            async with db:
                for n in range(50):
                    row = await db.fetchone("select %s, %s, pg_sleep(0.001)", (mark, n))
                    assert row[:2] == (mark, n), row

        async def same(mark):
            for n in range(50):
                row = await db.fetchone("select %s, %s, pg_sleep(0.001)", (mark, n))
                assert row[:2] == (mark, n), row

        children = []
        for mark in range(3):
            if (pid := os.fork()) == 0:
                run(many(mark))
                sys.exit(0)
            children.append(pid)
        loop.run_until_complete(same(99))
        for pid in children:
            reap(pid)
        loop.run_until_complete(go_on(before))
        loop.close()
        """,
        dsn,
        loop_name,
    )
    assert ended.out == "child ended 0\n" * 3 + "parent went on\n"


def test_a_child_that_only_ends_leaves_the_parents_sessions_alone(dsn: str, loop_name: str) -> None:
    """Its interpreter finalises what it inherited: pool, tasks, connections."""
    ended = run_fork(
        f"""
        import gc
        loop = {new_loop(loop_name)}
        loop.run_until_complete(begin())
        before = loop.run_until_complete(pids())
        flush()
        if (pid := os.fork()) == 0:
            held.clear()
            del db
            gc.collect()
            sys.exit(0)
        reap(pid)
        loop.run_until_complete(go_on(before))
        loop.close()
        """,
        dsn,
        loop_name,
    )
    assert ended.out == "child ended 0\nparent went on\n"


def test_a_grandchild_is_told_apart_from_a_child(dsn: str, loop_name: str) -> None:
    ended = run_fork(
        """
        async def child():
            await db.open()

        async def grandchild():
            await attempt("grandchild", lambda: db.fetchval("select 1"))
            async with db:
                assert await db.fetchval("select 45") == 45
            flush()

        async def finish():
            assert await db.fetchval("select 46") == 46
            await db.close()
            print("child went on")
            flush()

        if (pid := os.fork()) == 0:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(child())
            if (inner := os.fork()) == 0:
                asyncio.run(grandchild())
                sys.exit(0)
            reap(inner)
            flush()
            loop.run_until_complete(finish())
            loop.close()
            sys.exit(0)
        reap(pid)
        """,
        dsn,
        loop_name,
    )
    assert ended.out == (
        'grandchild refused: pool "orders" was opened in another process\n'
        "child ended 0\nchild went on\nchild ended 0\n"
    )


def new_loop(loop_name: str) -> str:
    return (
        "__import__('uvloop').new_event_loop()"
        if loop_name == "uvloop"
        else ("asyncio.new_event_loop()")
    )


def test_a_fork_that_python_is_not_told_of_is_refused_by_its_loop(dsn: str, loop_name: str) -> None:
    """As one made by a library in C: no hook runs in the child, whose loop is another one."""
    body = """
    import ctypes

    async def use():
        await attempt("fetchval", lambda: db.fetchval("select 1"))
        await attempt("execute", lambda: held[0].execute("select 1"))

    async def main_loop():
        await begin()
        return await pids()

    if run.__module__.startswith("uvloop"):
        from uvloop import new_event_loop
    else:
        from asyncio import new_event_loop
    loop = new_event_loop()
    before = loop.run_until_complete(main_loop())
    sys.stdout.flush()
    pid = ctypes.PyDLL(None).fork()
    if pid == 0:
        other = new_event_loop()
        other.run_until_complete(use())
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)
    loop.run_until_complete(go_on(before))
    loop.close()
    """
    ended = run_program(
        textwrap.dedent(PRELUDE) + textwrap.dedent(body), dsn, loop=loop_name, timeout=40
    )
    assert ended.code == 0, ended
    assert ended.out.count("refused") == 2, ended
    assert "NOT REFUSED" not in ended.out
    assert "parent went on" in ended.out
