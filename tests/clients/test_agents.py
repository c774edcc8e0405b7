"""
Agents that look at what psycopg does, each in a program of its own: they patch for good.

Tried with opentelemetry-instrumentation-psycopg 0.66b1, ddtrace 4.16.0, newrelic 14.1.0 and
elastic-apm 6.26.2. The last three put a proxy of wrapt's around each connection.
"""

from __future__ import annotations

import json

import pytest

from tests.support.programs import run_program

# Each leaves "seen": a function that returns the statements that the agent has seen since the
# last call. "around" is what it wants around the work.
OPENTELEMETRY = """
from contextlib import nullcontext as around
from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
PsycopgInstrumentor().instrument(tracer_provider=provider)

def seen():
    spans = exporter.get_finished_spans()
    exporter.clear()
    return [span.attributes.get("db.statement") for span in spans]
"""

DATADOG = """
os.environ.update(
    DD_TRACE_AGENT_URL="http://127.0.0.1:1", DD_INSTRUMENTATION_TELEMETRY_ENABLED="false",
    DD_REMOTE_CONFIGURATION_ENABLED="false", DD_TRACE_STARTUP_LOGS="false",
)
import logging
logging.getLogger("ddtrace").setLevel(logging.CRITICAL)
from contextlib import nullcontext as around
import ddtrace
from ddtrace.trace import TraceFilter, tracer

class Collect(TraceFilter):
    spans = []
    def process_trace(self, trace):
        self.spans += trace
        return None

tracer.configure(trace_processors=[Collect()])
ddtrace.patch(psycopg=True)

def seen():
    statements = [span.resource for span in Collect.spans if span.name == "postgres.query"]
    Collect.spans.clear()
    return statements
"""

NEW_RELIC = """
os.environ.update(NEW_RELIC_DEVELOPER_MODE="true", NEW_RELIC_LICENSE_KEY="x" * 40)
import newrelic.agent
newrelic.agent.initialize()
from newrelic.api.database_trace import DatabaseTrace

statements = []
enter = DatabaseTrace.__enter__
def collect(trace):
    statements.append(trace.sql)
    return enter(trace)
DatabaseTrace.__enter__ = collect

application = newrelic.agent.register_application(timeout=10)
def around():
    return newrelic.agent.BackgroundTask(application, name="work")

def seen():
    found, statements[:] = statements[:], []
    return found
"""

ELASTIC = """
import elasticapm
from elasticapm.transport.base import Transport
from contextlib import contextmanager

spans = []
class Collect(Transport):
    def queue(self, event_type, data, flush=False):
        if event_type == "span":
            spans.append(data)
    def start_thread(self, *args, **kwargs):
        pass

client = elasticapm.Client(
    service_name="orders", transport_class="__main__.Collect", cloud_provider=False,
    metrics_interval="0s", central_config=False, span_compression_enabled=False,
)
elasticapm.instrument()

@contextmanager
def around():
    client.begin_transaction("work")
    yield
    client.end_transaction("work")

def seen():
    found = [s["context"]["db"]["statement"] for s in spans if s["action"] == "query"]
    spans.clear()
    return found
"""

WORK = """
import json
import psycopg
from psycopg_pool import AsyncConnectionPool
from poolkeeper import PoolManager

async def main(which, dsn):
    settings = dict(min_size=2, max_size=2, timeout=5)
    if which == "bare":
        pool = AsyncConnectionPool(dsn, open=False, **settings)
    else:
        pool = PoolManager(dsn, name="orders", **settings).pool
    await pool.open(wait=True)
    seen()
    outcomes = []
    held = []
    for number in range(5):
        with around():
            async with pool.connection() as conn:
                cursor = conn.cursor()
                await cursor.execute("select %s::int + 1", (number,))
                (row,) = await cursor.fetchone()
                is_one = isinstance(conn, psycopg.AsyncConnection)
                kind = type(conn).__name__
                held.append(conn)
        outcomes.append([row, is_one, kind, [s for s in seen() if "select %s" in str(s)]])
    with around():
        try:
            async with pool.connection() as conn:
                await conn.cursor().execute("select no_such_column")
        except psycopg.errors.UndefinedColumn:
            outcomes.append("undefined column")
        conn = await pool.getconn()
        await conn.cursor().execute("select 1")
        await conn.commit()
        await pool.putconn(conn)
    if which == "ours":
        from poolkeeper import ReleasedConnectionError
        for conn in held:
            try:
                await conn.cursor().execute("select 1")
            except ReleasedConnectionError:
                pass
            else:
                raise AssertionError("a connection that was given back works")
    await pool.close()
    print(json.dumps(outcomes))

run(main(*sys.argv[1:]))
"""

AGENTS = {
    "opentelemetry": OPENTELEMETRY,
    "datadog": DATADOG,
    "new relic": NEW_RELIC,
    "elastic": ELASTIC,
}


@pytest.mark.parametrize("agent", AGENTS)
def test_an_agent_sees_what_every_checkout_does(dsn: str, loop_name: str, agent: str) -> None:
    """On our pool as on psycopg_pool's own."""
    outcomes = {}
    for which in ("bare", "ours"):
        program = AGENTS[agent] + WORK
        ended = run_program(program, which, dsn, timeout=60, loop=loop_name)
        assert ended.code == 0, ended.err
        outcomes[which] = json.loads(ended.out.splitlines()[-1])
    bare, ours = outcomes["bare"], outcomes["ours"]
    assert len(bare) == len(ours) == 6
    assert bare[-1] == ours[-1] == "undefined column"
    for number, (theirs, mine) in enumerate(zip(bare[:-1], ours[:-1], strict=True)):
        assert theirs[:2] == mine[:2] == [number + 1, True]
        assert theirs[3] == mine[3] == ["select %s::int + 1"]
        assert mine[2] in (theirs[2], f"Bound{theirs[2]}")  # a proxy is of the same class
