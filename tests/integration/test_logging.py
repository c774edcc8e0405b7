"""What the log has: each event in one place, one line, fields; and how it is seen."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

import poolkeeper
from poolkeeper import AcquireTimeout, PoolManager
from poolkeeper._log import EVENTS, SAID, log
from poolkeeper._storm import Storm
from tests.docs.blocks import blocks, normal
from tests.support.proxy import FaultProxy
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "howto" / "logging.md"
HERE = "tests/integration/test_logging.py"


def fields_of(name: str) -> list[str]:
    """What a record of an event has, as the table says it."""
    in_text = re.findall(r"%\((\w+)\)", EVENTS[name].text)
    return list(dict.fromkeys((*in_text, *EVENTS[name].fields)))


def extra(record: logging.LogRecord) -> dict[str, Any]:
    """What a record has beside what every record has."""
    own = vars(logging.makeLogRecord({})).keys() | {"message", "asctime", "taskName"}
    return {name: value for name, value in vars(record).items() if name not in own}


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[logging.LogRecord]]:
    """A function that returns the records of an event."""
    caplog.set_level(logging.DEBUG, logger="poolkeeper")

    def find(name: str) -> list[logging.LogRecord]:
        wanted = f"poolkeeper.{name}"
        return [r for r in caplog.records if vars(r).get("event_name") == wanted]

    return find


Told = Callable[[str], list[logging.LogRecord]]


# --- how it is defined --------------------------------------------------------------------------


def test_every_event_is_logged_somewhere_and_nothing_else_is() -> None:
    texts = [path.read_text() for path in Path(poolkeeper.__file__).parent.rglob("*.py")]
    told = re.compile(r'\b(?:log|_?life\.tell)\(\s*"(\w+)"')
    logged = {name for text in texts for name in told.findall(text)}
    logged |= {name for text in texts for name in re.findall(r'^ +\("(settings_\w+)"', text, re.M)}
    assert logged == set(EVENTS)
    strange = [text for text in texts if re.search(r"\blogger\.(debug|info|warn|error|log)", text)]
    assert not strange


@pytest.mark.parametrize("name", EVENTS)
def test_an_event_is_one_line_whose_fields_are_not_loggings_own(
    name: str, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    fields = fields_of(name)
    as_numbers = re.findall(r"%\((\w+)\)[.\d]*[df]", EVENTS[name].text)
    log(name, {field: 1 if field in as_numbers else field for field in fields})
    (record,) = told(name)
    assert "\n" not in record.getMessage()
    assert record.levelno == EVENTS[name].level
    assert set(extra(record)) == {"event_name", *fields}
    assert record.pathname == __file__


def test_the_page_has_each_event_with_its_level_and_fields() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| [^|]+ \| ([^|]*) \|$", PAGE.read_text(), re.M)
    in_page = {name: (level, re.findall(r"`(\w+)`", fields)) for name, level, fields in rows}
    assert in_page == {
        name: (logging.getLevelName(event.level), fields_of(name)) for name, event in EVENTS.items()
    }


# --- what is said -------------------------------------------------------------------------------


async def time_out(db: PoolManager[Any], seconds: float = 0.05) -> None:
    with suppress(AcquireTimeout):
        await db.fetchval("select %s", ("hushhush",), timeout=seconds)


async def test_a_time_out_has_its_cause_numbers_line_detail_and_hint_as_fields(
    make_manager: MakeManager, told: Told
) -> None:
    db = make_manager(min_size=1, name="orders")
    await db.open()
    async with db.connection():
        await asyncio.create_task(time_out(db), name="report-7")
    (record,) = told("acquire_timeout")
    line = time_out.__code__.co_firstlineno + 2
    fields = extra(record)
    assert record.getMessage() == (
        'could not acquire a connection from pool "orders" within 0.05 s: all connections are in'
        " use"
    )
    assert fields["pool"] == "orders"
    assert fields["cause"] == "all-in-use"
    assert fields["summary"] == "all connections are in use"
    assert (fields["task"], fields["timeout_seconds"]) == ("report-7", 0.05)
    assert fields["site"].startswith(f"{HERE}:{line}")
    assert 0.05 <= fields["waited_seconds"] < 20
    assert [fields[name] for name in ("total", "in_use", "idle", "max", "waiting")] == [
        1, 1, 0, 1, 0,
    ]  # fmt: skip
    assert fields["detail"].startswith("total=1 in_use=1 idle=0 max=1 waiting=0.")
    assert "poolkeeper explain all-in-use" in fields["hint"]


async def test_pythons_own_formatter_prints_detail_and_hint_below_the_line(
    make_manager: MakeManager, told: Told
) -> None:
    db = make_manager(min_size=1, name="orders")
    await db.open()
    async with db.connection():
        await asyncio.create_task(time_out(db))
    (record,) = told("acquire_timeout")
    first, detail, hint = logging.Formatter("%(levelname)s %(message)s").format(record).splitlines()
    assert first == f"WARNING {record.getMessage()}"
    assert detail == f"DETAIL:  {vars(record)['detail']}"
    assert hint == f"HINT:  {vars(record)['hint']}"


async def test_the_end_of_a_storm_says_how_many_there_were(
    make_manager: MakeManager, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storm, "CALM", 0.4)
    db = make_manager(min_size=1, name="orders")
    await db.open()
    async with db.connection():
        await asyncio.gather(*(asyncio.create_task(time_out(db, 0.1)) for _ in range(30)))
        await asyncio.gather(*(asyncio.create_task(time_out(db, 0)) for _ in range(12)))
        assert len(told("acquire_timeout")) == 1
        assert not told("acquire_timeouts_over")
        await until(lambda: told("acquire_timeouts_over"))
        (over,) = told("acquire_timeouts_over")
        assert over.levelname == told("acquire_timeout")[0].levelname
        assert over.getMessage().startswith(
            'pool "orders": the time-outs are over: 42 acquires failed in '
        )
        assert vars(over)["number"] == 42
        # One is all of it, and was told.
        await asyncio.create_task(time_out(db))
        await asyncio.sleep(1)
    assert len(told("acquire_timeout")) == 2
    assert len(told("acquire_timeouts_over")) == 1


async def test_a_storm_that_close_ends_is_told_then(make_manager: MakeManager, told: Told) -> None:
    db = make_manager(min_size=1, name="orders")
    await db.open()
    async with db.connection():
        await asyncio.gather(*(asyncio.create_task(time_out(db)) for _ in range(3)))
    await db.close()
    (over,) = told("acquire_timeouts_over")
    assert vars(over)["number"] == 3


async def test_the_end_of_an_outage_is_as_loud_as_its_beginning(
    proxy: FaultProxy, make_manager: MakeManager, told: Told
) -> None:
    db = make_manager(proxy.dsn, min_size=1, name="orders")
    await db.open()
    proxy.refuse = True
    await asyncio.to_thread(proxy.cut)
    with suppress(psycopg.Error):
        await db.fetchval("select 1", timeout=1)
    await until(lambda: told("outage_began"))
    (began,) = told("outage_began")
    assert extra(began).keys() >= {"pool", "reason", "kind", "hint", "total", "waiting"}
    assert "\n" not in began.getMessage()
    assert "poolkeeper explain server" in vars(began)["hint"]
    proxy.refuse = False
    await until(lambda: told("outage_over"))
    (over,) = told("outage_over")
    assert (began.levelname, over.levelname) == ("WARNING", "WARNING")
    assert vars(over)["outage_seconds"] > 0
    assert vars(over)["attempts_failed"] >= 1


async def test_no_field_holds_a_query_a_parameter_or_a_password(
    make_manager: MakeManager, told: Told, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    db = make_manager(f"{dsn} password=s3cret-pw" if "://" not in dsn else dsn, min_size=1)
    await db.open()
    async with db.connection() as conn:
        await asyncio.create_task(time_out(db))
        await conn.execute("set time zone 'Asia/Tokyo'")
    held = await db.pool.getconn()
    await held.execute("create temporary table t as select 'hushhush'")
    await db.pool.putconn(held)
    await until(lambda: told("settings_put_back") and told("work_rolled_back"))
    shown = repr([vars(record) for record in caplog.records if record.name == "poolkeeper"])
    for word in ("hushhush", "s3cret-pw", "Tokyo", "temporary"):
        assert word not in shown


# --- as it is seen ------------------------------------------------------------------------------

APP = """\
import asyncio
import os
from contextlib import suppress

from poolkeeper import AcquireTimeout, PoolManager

db = PoolManager(os.environ["DATABASE_URL"], min_size=1, name="shop")


async def report():
    return await db.fetchval("select 1", timeout=0.2)


async def fail():
    async with db, db.connection():
        with suppress(AcquireTimeout):
            await asyncio.create_task(report(), name="report")


async def app(scope, receive, send):
    assert scope["type"] == "lifespan"
    await receive()
    await fail()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
"""

DJANGO = """\
import asyncio

import django
from django.conf import settings

settings.configure()
django.setup()

from app import fail

asyncio.run(fail())
"""


def run(directory: Path, dsn: str, *command: str) -> str:
    """Return what a program, or a server until it has said its HINT, writes."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=directory,
        env={
            **os.environ,
            "DATABASE_URL": dsn,
            "PYTHONUNBUFFERED": "1",
            "PYTHONASYNCIODEBUG": "",
            "PYTHONPATH": os.pathsep.join([str(directory), *sys.path]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        enough = threading.Timer(60, process.kill)
        enough.start()
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("HINT:"):
                process.terminate()
        enough.cancel()
    return "".join(lines)


def samples() -> dict[str, str]:
    """What the page says that is seen."""
    return dict(
        re.findall(r"^<!-- logged: (\w+) -->\n```\w+\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    )


def masked(text: str) -> str:
    text = re.sub(r"(app\.py|server process) ?:?\d+", r"\1 N", text)
    return normal(re.sub(r"\[\d+\]|\b\d\.\d+\b", "N", text))


COMMANDS = {
    "uvicorn": ["-m", "uvicorn", "app:app", "--port=0"],
    "gunicorn": ["-m", "gunicorn", "app:app", "--worker-class=uvicorn_worker.UvicornWorker",
                 "--bind=127.0.0.1:0"],
    "django": ["django_app.py"],
    "configured": [str(ROOT / "tests/support/serve_logging.py"), "0"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_server_with_its_default_configuration_shows_what_the_page_says(
    name: str, dsn: str, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "django_app.py").write_text(DJANGO)
    said = run(tmp_path, dsn, *COMMANDS[name])
    lines = [line for line in said.splitlines() if not line.startswith(("INFO", "["))]
    assert masked("\n".join(lines[:3])) == masked(samples()[name]), said


@pytest.mark.parametrize("name", ["json", "structlog"])
def test_a_formatter_for_json_has_the_fields_that_the_page_shows(
    name: str, dsn: str, tmp_path: Path
) -> None:
    programs = [b.body for b in blocks(PAGE) if b.language == "python" and not b.source]
    (tmp_path / "app.py").write_text(programs[["json", "structlog"].index(name)])
    said = run(tmp_path, dsn, "app.py")
    (line,) = said.splitlines()
    record, sample = json.loads(line), json.loads(samples()[name])
    assert list(record) == list(sample)
    assert masked(line) == masked(json.dumps(sample))
    fields = {"event_name", *fields_of("acquire_timeout")}
    assert fields <= set(record)
    assert not {record[word] for word in SAID} & {None, ""}
