"""Places in words: line of code, task, loop, thread."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

from poolkeeper import _where
from poolkeeper._where import (
    NO_LOOP,
    Handler,
    Place,
    asker,
    call_site,
    describe_loop,
    function_of,
    program_frame,
    running_loop,
    site,
    where_now,
)

HERE = "tests/unit/test_where.py"


def as_if_in(module: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return *function* as if it were defined in *module*."""
    assert isinstance(function, FunctionType)
    return FunctionType(
        function.__code__,
        {**function.__globals__, "__name__": module},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def line_after(function: Callable[..., Any], lines: int = 1) -> str:
    assert isinstance(function, FunctionType)
    return f"{HERE}:{function.__code__.co_firstlineno + lines}"


# --- the line of code --------------------------------------------------------------------


def test_the_call_site_is_the_callers_line() -> None:
    def asks() -> str:
        return call_site()

    assert asks() == line_after(asks)


@pytest.mark.parametrize(
    "module",
    [
        "poolkeeper",
        "poolkeeper._pool",
        "psycopg.cursor_async",
        "psycopg_pool.pool_async",
        "contextlib",
        "asyncio.tasks",
        "weakref",
    ],
)
def test_our_own_lines_and_those_we_stand_on_are_passed_over(module: str) -> None:
    def inner() -> str:
        return call_site()

    internal = as_if_in(module, inner)

    def user() -> str:
        return str(internal())

    assert user() == line_after(user)


@pytest.mark.parametrize("module", ["poolkeeper_app.main", "psycopg_tools", "asyncio_helpers"])
def test_a_module_whose_name_only_begins_like_ours_is_the_users(module: str) -> None:
    def inner() -> str:
        return call_site()

    assert as_if_in(module, inner)() == line_after(inner)


def test_a_context_manager_of_the_standard_library_is_passed_over() -> None:
    seen = []

    def note() -> None:
        seen.append(call_site())

    @contextmanager
    def block() -> Iterator[None]:
        as_if_in("poolkeeper._manager", note)()
        yield

    def user() -> None:
        with block():
            pass

    user()
    # The generator is the user's own here, so its line is named: the innermost that is not ours.
    assert seen == [line_after(block.__wrapped__, 2)]  # type: ignore[attr-defined]


def test_a_stack_of_our_lines_only_still_has_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_where, "_INTERNAL", _Everything())

    def inner() -> str:
        return call_site()

    assert inner() == line_after(inner)


class _Everything:
    def __contains__(self, item: object) -> bool:
        return True


def code_of(path: str) -> CodeType:
    return compile("0", path, "exec")


def test_a_path_is_relative_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert site(code_of(f"{tmp_path}/app/main.py"), 31) == f"app{os.sep}main.py:31"
    assert site(code_of(f"{tmp_path}-other/main.py"), 31) == f"{tmp_path}-other/main.py:31"
    assert site(code_of("/usr/lib/x.py"), 1) == "/usr/lib/x.py:1"
    assert site(code_of("app.py"), 1) == "app.py:1"


def test_a_path_is_whole_where_the_working_directory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert site(code_of(f"{gone}/main.py"), 31) == f"{gone}/main.py:31"


# --- who asks ----------------------------------------------------------------------------


def a_decorator(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


@a_decorator
@a_decorator
async def decorated(
    first: int,
    second: int,
) -> int:
    return first + second


class Orders:
    @staticmethod
    def show() -> None: ...


def test_a_function_as_a_whole_stands_where_its_def_does() -> None:
    code = code_of_function(decorated)
    lines = Path(__file__).read_text().splitlines()
    place, _, line = site(code, code.co_firstlineno).partition(":")
    assert place == HERE
    assert lines[int(line) - 1] == "async def decorated("


def test_a_function_without_its_source_stands_where_its_code_begins() -> None:
    code = code_of_function(decorated).replace(co_filename="/gone/app.py")
    assert site(code, code.co_firstlineno) == f"/gone/app.py:{code.co_firstlineno}"


def code_of_function(function: Any) -> CodeType:
    assert isinstance(function, FunctionType)
    return function.__code__


def test_a_function_has_the_name_that_people_call_it_by() -> None:
    def inner() -> Callable[..., Any]:
        return lambda: None

    assert function_of(code_of_function(decorated)) == "decorated"
    assert function_of(code_of_function(Orders.show)) == "Orders.show"
    assert function_of(code_of_function(inner)) == "inner"
    assert function_of(code_of_function(inner())) == "inner"
    assert function_of(code_of("app.py")) == ""


def test_a_handler_is_named_by_its_route_too() -> None:
    code = code_of_function(Orders.show).replace(co_filename="web.py")
    assert asker(code, 9) == "web.py:9 in Orders.show"
    assert asker(code_of("web.py"), 9) == "web.py:9"
    handler = Handler(code, "GET", "/orders/{id}")
    assert asker(handler, 9) == "GET /orders/{id}, web.py:9 in Orders.show"


def test_of_a_handler_in_a_library_only_the_route_is_told() -> None:
    handler = Handler(code_of_function(asyncio.run), "GET", "/orders/{id}")
    assert asker(handler, 9) == "GET /orders/{id}"


# --- loops -------------------------------------------------------------------------------


def test_there_is_no_running_loop_outside_of_one() -> None:
    assert running_loop() is None
    assert describe_loop(None) == NO_LOOP == "no event loop"


async def test_the_running_loop_is_found() -> None:
    assert running_loop() is asyncio.get_running_loop()


def test_loops_are_numbered_as_they_are_seen() -> None:
    loops = [asyncio.SelectorEventLoop() for _ in range(3)]
    try:
        numbers = [int(describe_loop(loop).partition("/")[0]) for loop in loops]
        assert numbers == [numbers[0], numbers[0] + 1, numbers[0] + 2]
        assert describe_loop(loops[0]) == f"{numbers[0]}/asyncio"
    finally:
        for loop in loops:
            loop.close()


def test_a_number_is_not_given_twice() -> None:
    """As `id()` is."""

    def number() -> str:
        loop = asyncio.SelectorEventLoop()
        try:
            return describe_loop(loop)
        finally:
            loop.close()

    seen = [number() for _ in range(5)]
    gc.collect()
    assert len(set(seen)) == 5


def test_a_loop_is_not_kept_alive() -> None:
    import weakref

    loop = asyncio.SelectorEventLoop()
    describe_loop(loop)
    loop.close()
    reference = weakref.ref(loop)
    del loop
    gc.collect()
    assert reference() is None


async def test_the_kind_of_a_loop_is_the_package_that_it_is_from(loop_name: str) -> None:
    assert describe_loop(asyncio.get_running_loop()).endswith(f"/{loop_name}")


# --- places ------------------------------------------------------------------------------


async def test_a_place_in_a_task_names_all_there_is(loop_name: str) -> None:
    async def work() -> Place:
        return Place.here()

    place = await asyncio.create_task(work(), name="lifespan")
    loop = describe_loop(asyncio.get_running_loop())
    assert place == Place(line_after(work), "lifespan", loop, "MainThread", os.getpid())
    number = loop.partition("/")[0]
    assert str(place) == (
        f'at {line_after(work)} in task "lifespan" on loop {number}'
        f' ({loop_name}, thread "MainThread")'
    )
    assert place.describe("closed") == (
        f'at {line_after(work)} in task "lifespan" on loop {number}'
        f' ({loop_name}, thread "MainThread", closed)'
    )


async def test_a_place_in_a_callback_of_the_loop_is_outside_of_any_task(loop_name: str) -> None:
    places = asyncio.get_running_loop().create_future()

    def callback() -> None:
        places.set_result(Place.here())

    asyncio.get_running_loop().call_soon(callback)
    place = await places
    assert place.task is None
    assert str(place).startswith(f"at {line_after(callback)} outside of any task on loop ")


def test_a_place_without_a_loop_says_so() -> None:
    def program() -> Place:
        return Place.here()

    place = program()
    assert place == Place(line_after(program), None, NO_LOOP, "MainThread", os.getpid())
    assert str(place) == (
        f'at {line_after(program)} outside of any task (no event loop, thread "MainThread")'
    )


def test_a_place_in_another_thread_names_it() -> None:
    with ThreadPoolExecutor(1, thread_name_prefix="jobs") as threads:
        place = threads.submit(Place.here).result()
    assert place.thread == "jobs_0"
    assert 'thread "jobs_0"' in str(place)


async def test_a_place_holds_nothing_but_strings_and_numbers() -> None:
    place = Place.here()
    values = [getattr(place, name) for name in Place._fields]
    assert {type(value) for value in values} <= {str, int}
    with pytest.raises(AttributeError):
        place.site = "x"  # type: ignore[misc]


# --- the program's own frame ---------------------------------------------------------------


def looks(*libraries: str) -> FrameType:
    return program_frame(sys._getframe(), *libraries)


def installed(module: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return *function* as if it were installed, as a part of *module*."""
    again = as_if_in(module, function)
    path = str(Path(os.__file__).parent / "site-packages" / f"{module.replace('.', '/')}.py")
    again.__code__ = again.__code__.replace(co_filename=path)
    return again


async def test_the_programs_frame_lies_beyond_every_library() -> None:
    def program() -> FrameType:
        return library()  # type: ignore[no-any-return]

    library = installed("orm.session", lambda: driver())
    driver = installed("driver", looks)
    assert program().f_code is program.__code__


async def test_of_an_installed_program_it_is_the_innermost_that_is_not_the_librarys() -> None:
    """Nobody above the loop is asked: a server's script, say, which is no package's."""

    async def handle() -> FrameType:
        return library()  # type: ignore[no-any-return]

    library = installed("orm.session", lambda: looks_installed("orm"))
    looks_installed = installed("poolkeeper.adapters.orm", looks)
    inner = installed("shop.views", handle)
    task = asyncio.create_task(inner())
    assert (await task).f_globals["__name__"] == "shop.views"


async def deep(levels: int, innermost: Callable[[], Awaitable[object]]) -> None:
    if levels:
        await deep(levels - 1, innermost)
    else:
        await innermost()


@asynccontextmanager
async def standing(
    levels: int, innermost: Callable[[], Awaitable[object]]
) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(deep(levels, innermost))
    await asyncio.sleep(0)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_it_is_looked_for_where_a_task_stands_only_so_deep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_where, "_DEEPEST", 5)
    first = deep.__code__.co_firstlineno
    async with standing(2, asyncio.Event().wait) as task:
        assert where_now(task, deep.__code__)[0] == (deep.__code__, first + 4)
    async with standing(20, asyncio.Event().wait) as task:
        assert where_now(task, deep.__code__)[0] == (deep.__code__, first + 2)


async def test_the_request_of_a_task_is_looked_for_only_so_deep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_where, "_DEEPEST", 5)
    monkeypatch.setattr(_where, "_tellers", [lambda _: ("GET", "/orders")])
    framework: dict[str, Any] = {}
    source = "async def handle(request):\n    await request.wait()\n"
    exec(compile(source, asyncio.__file__, "exec"), framework)
    handle = partial(framework["handle"], asyncio.Event())
    async with standing(2, handle) as task:
        assert _where.answering(deep.__code__, task) == Handler(deep.__code__, "GET", "/orders")
    async with standing(20, handle) as task:
        assert _where.answering(deep.__code__, task) is deep.__code__


async def test_the_request_of_those_who_wait_for_a_task_is_looked_for_only_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_where, "_MOST_TASKS", 5)
    monkeypatch.setattr(_where, "_tellers", [lambda _: ("GET", "/orders")])
    framework: dict[str, Any] = {}
    source = "async def handle(request, work):\n    await work()\n"
    exec(compile(source, asyncio.__file__, "exec"), framework)
    innermost: list[asyncio.Task[Any]] = []

    async def chain(tasks: int) -> None:
        if tasks:
            innermost[:] = [asyncio.create_task(chain(tasks - 1))]
            await asyncio.gather(*innermost)
        else:
            await asyncio.Event().wait()

    for tasks, found in ((2, Handler(deep.__code__, "GET", "/orders")), (8, deep.__code__)):
        handle = partial(framework["handle"], object(), partial(chain, tasks))
        async with standing(0, handle):
            for _ in range(tasks):
                await asyncio.sleep(0)
            assert _where.answering(deep.__code__, innermost[0]) == found
