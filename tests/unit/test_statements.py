"""Which way a statement goes, by its text and by how long it took before."""

from __future__ import annotations

import pytest

from poolkeeper import _statements
from poolkeeper._statements import (
    MOST,
    MOST_PENALTY,
    PENALTY,
    Texts,
    Way,
    numbers_parameters,
    way_of,
)


@pytest.mark.parametrize(
    "text",
    [
        "select 1",
        "  SELECT now();  ",
        "(select 1) union all (values (2))",
        "values (1), (2)",
        "table accounts",
        "-- which\n select /* all */ count(*) from t",
        "with x as (select 1) select * from x",
        "select * from t where a in (%s) and b = any(%(b)s) and c = 'insert (it''s) for you'",
        'select "into", x::numeric(10, 2) from "for update"',
        "select pg_catalog.lower(name) from t",
        "select pg_catalog . lower (name) from 表",
        "select jsonb_path_query(a, '$.b') from t",
    ],
)
def test_plain_reads_share(text: str) -> None:
    assert way_of(text) is Way.SHARED


@pytest.mark.parametrize(
    "text",
    [
        "insert into t values (%s)",
        "/* a */ update t set a = 1",
        "delete from t",
        "merge into t using s on true when matched then delete",
        "with x as (insert into t values (1) returning *) select * from x",
        "select * from t for update",
        "select * from t for no key update skip locked",
        "select * from t for key share",
        "select * into x from y",
        "select nextval('s')",
        "select pg_advisory_lock(1)",
        "select set_config('a.b', 'c', false)",
        "select pg_notify('a', 'b')",
        "select mine.lower('A')",
        'select "f" (1)',
        "select count(*), f (1)",
        r"select E'it\'s f(', g('1')",
        "select $$ a $$, f($$ b $$)",
        "select $a$ ' $a$, f(1)",
        "select /* /* */ f(1) */ 1",
        "with f(a) as (select 1) select * from f",
        "select current_setting('transaction_read_only')",
        "select setting from pg_catalog.pg_settings where name = 'transaction_read_only'",
        "select 更新(1)",
        "select 更新count(1)",
        "select \N{ROCKET}(1)",
        "select ran\N{KELVIN SIGN}(1)",
        "select lower\N{NO-BREAK SPACE}('A')",
        "select mine . lower('A')",
        "select mine./* its own */lower('A')",
        "select U&\"f!0061\" uescape '!' (1)",
        "select $é$ ' $é$, f(1), ' '",
        "select 1 -- one\r, f(1)",
        "select /* /* */ ' */ f(1) /* ' */",
    ],
)
def test_what_may_write_or_lock_or_call_anything_is_alone(text: str) -> None:
    assert way_of(text) is Way.ALONE


@pytest.mark.parametrize(
    "text",
    [
        "",
        " -- nothing",
        "select 1; select 2",
        "select ';'",
        "set timezone to utc",
        "vacuum",
        "copy t to stdout",
        "listen a",
        "create table t ()",
        "begin",
        "explain select 1",
        "call f()",
        "fetch 1 from c",
        "/* /* */ */ select 1",
        "select " + "1, " * 5000 + "1",
    ],
)
def test_all_else_is_psycopgs_affair(text: str) -> None:
    assert way_of(text) is Way.CURSOR


@pytest.mark.parametrize("text", ["select $1", "insert into t values ('a' || $2 || 'b')"])
def test_what_numbers_its_parameters_is_known(text: str) -> None:
    assert numbers_parameters(text)
    assert not numbers_parameters("select '$1', \"$1\", a$b from t -- $1")


@pytest.mark.parametrize("query", [b"select 1", None, 1])
def test_what_is_no_text_is_psycopgs_affair(query: object) -> None:
    assert Texts().known(query).way is Way.CURSOR


def test_a_text_shares_after_a_quick_run_and_not_for_a_while_after_a_slow_one() -> None:
    known = Texts().known("select 1")
    assert not known.shares
    known.was_quick()
    assert known.shares
    penalty = PENALTY
    for _ in range(10):
        known.was_slow()
        for _ in range(penalty):
            assert not known.shares
            known.was_quick()
        assert known.shares
        penalty = min(2 * penalty, MOST_PENALTY)


def test_that_a_text_was_slow_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(_statements, "monotonic", lambda: now)
    known = Texts().known("select 1")
    for _ in range(10):
        known.was_slow()
    now += _statements.FORGIVEN + 1
    known.was_slow()
    for _ in range(PENALTY):
        assert not known.shares
        known.was_quick()
    assert known.shares


def test_what_writes_never_shares() -> None:
    known = Texts().known("delete from t")
    known.was_quick()
    known.was_quick()
    assert not known.shares


def test_the_last_texts_are_remembered() -> None:
    texts = Texts()
    first = texts.known("select 0")
    assert texts.known("select 0") is first
    for n in range(1, MOST + 1):
        texts.known(f"select {n}")
    assert len(texts._known) == MOST
    assert texts.known("select 0") is not first
