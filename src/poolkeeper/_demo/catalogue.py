"""
What each mistake is, and what came of it, read from the facts that its program reported.

The words of a cell are made from the facts alone, the same way for both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .programs import Run

SKIPPED = "not shown: "

AT_ONCE = 0.9
"""Seconds: less than any timeout of the programs, with room for a busy machine."""


@dataclass(frozen=True)
class Case:
    """
    One program, and how to read what it reported.

    Attributes:
        program: Its name in `mistakes`.
        label: Its row in the closing table.
        tell: Says in a few words what happened.
        kept: Tells whether that is what poolkeeper promises.
        shown: The messages to print.
    """

    program: str
    label: str
    tell: Callable[[Run], str]
    kept: Callable[[Run], bool]
    shown: Callable[[Run], list[str]]

    def cell(self, run: Run) -> str:
        """Return what happened on one side."""
        if "skipped" in run.facts:
            return f"{SKIPPED}{run.facts['skipped']}"
        try:
            return self.tell(run)
        except (KeyError, TypeError):
            ended = "was killed" if run.killed else f"ended with status {run.code}"
            return f"the program {ended} and reported nothing: {run.last_words or 'no message'}"

    def messages(self, run: Run) -> list[str]:
        """Return the messages that one side printed, the whole of them."""
        try:
            return self.shown(run)
        except (KeyError, TypeError):
            return []

    def broken(self, run: Run) -> bool:
        """Tell whether poolkeeper did not do what it promises."""
        if "skipped" in run.facts:
            return False
        try:
            return not self.kept(run)
        except (KeyError, TypeError):
            return True


@dataclass(frozen=True)
class Mistake:
    """One mistake: what it is, in a few lines, and the programs that make it."""

    title: str
    story: str
    cases: tuple[Case, ...]


# --- words ------------------------------------------------------------------------------------


def span(seconds: float) -> str:
    """Return a duration in words."""
    if seconds < 0.001:
        return f"{seconds * 1000:.2f} ms"
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s"


def _ended(tried: dict[str, Any], worked: str) -> str:
    if tried["error"] is None:
        return worked
    return f"{tried['error']} after {span(tried['seconds'])}"


def _text(tried: dict[str, Any]) -> list[str]:
    return [f"{tried['error']}: {tried['message']}"] if tried["error"] else []


def _refused(tried: dict[str, Any], error: str) -> bool:
    return bool(tried["error"] == error and tried["seconds"] < AT_ONCE)


def _tried_text(run: Run) -> list[str]:
    return _text(run.facts["tried"])


def _nothing(_: Run) -> list[str]:
    return []


# --- one by one ---------------------------------------------------------------------------------


def _two_runs(run: Run) -> str:
    attempts = run.facts["attempts"]
    failed = [tried for tried in attempts if tried["error"]]
    served = sum(not tried["error"] for tried in run.facts["served"])
    if len(failed) < len(attempts):
        text = f"{len(attempts) - len(failed)} of {len(attempts)} requests worked, by luck"
        text += f"; the other: {_ended(failed[0], '')}" if failed else ""
    else:
        text = f"both requests refused: {_ended(failed[-1], '')}"
    return f"{text}. open() again, then: {served} of {len(attempts)} worked"


def _two_runs_kept(run: Run) -> bool:
    return all(_refused(tried, "LoopMismatchError") for tried in run.facts["attempts"]) and not any(
        tried["error"] for tried in [run.facts["opened"], *run.facts["served"]]
    )


def _two_runs_text(run: Run) -> list[str]:
    failed = [tried for tried in run.facts["attempts"] if tried["error"]]
    return _text(failed[-1]) if failed else []


def _fails_while_connecting(run: Run) -> str:
    seconds = run.ended - run.facts["raised_at"]
    if run.killed:
        return f"hangs: killed after {span(seconds)}, the program's own error never shown"
    return f"ends {span(seconds)} after its own error, which is shown"


def _fails_while_connecting_kept(run: Run) -> bool:
    return not run.killed and run.last_words.startswith("ValueError")


def _second_loop(run: Run) -> str:
    late = run.facts["seconds_after_it_was_free"]
    tried = run.facts["tried"]
    if tried["seconds"] > AT_ONCE:
        return f"{_ended(tried, 'served')}, {span(late)} after the connection was free"
    return _ended(tried, "served at once")


def _second_loop_kept(run: Run) -> bool:
    return _refused(run.facts["tried"], "LoopMismatchError")


def _other_loop(run: Run) -> str:
    return _ended(run.facts["tried"], "works; nothing keeps the two loops apart, nothing is said")


def _other_loop_kept(run: Run) -> bool:
    return _second_loop_kept(run) and not run.facts["owner"]["error"]


def _fork(run: Run) -> str:
    parent, child = run.facts["parent"], run.facts["child"]
    if child["refused"]:
        opened = not child["opened"]["error"] and not child["served"]["error"]
        return (
            f"child: {_ended(child['refused'], '')}; parent: {parent['right']} answers right,"
            f" {parent['wrong']} wrong. Opened again in the child:"
            f" {'works' if opened else 'fails'}"
        )
    both = (parent, child)
    right, wrong, errors = (sum(one[key] for one in both) for key in ("right", "wrong", "errors"))
    hung = " and ".join(name for name, one in (("parent", parent), ("child", child)) if one["hung"])
    return (
        f"{wrong} of {right + wrong} answers were the other process's, without an error;"
        f" {errors} errors{f'; {hung} hung' if hung else ''}"
    )


def _fork_kept(run: Run) -> bool:
    parent, child = run.facts["parent"], run.facts["child"]
    return bool(
        _refused(child["refused"], "LoopMismatchError")
        and not child["opened"]["error"]
        and not child["served"]["error"]
        and parent["right"]
        and not (parent["wrong"] or parent["errors"] or parent["hung"])
    )


def _fork_text(run: Run) -> list[str]:
    refused = run.facts["child"]["refused"]
    return _text(refused) if refused else []


def _stale(run: Run) -> str:
    done = _ended(run.facts["tried"], "rollback() accepted")
    return f"{done}; the other task's commit kept {run.facts['rows']} of 1 rows"


def _stale_kept(run: Run) -> bool:
    return _refused(run.facts["tried"], "ReleasedConnectionError") and run.facts["rows"] == 1


def _double(run: Run) -> str:
    owners = "one session has two owners" if run.facts["owners"] == 2 else "one owner a session"
    return f"{_ended(run.facts['tried'], 'accepted')}; {owners}"


def _double_kept(run: Run) -> bool:
    return _refused(run.facts["tried"], "ReleasedConnectionError") and run.facts["owners"] == 1


def _open(run: Run) -> str:
    tried = run.facts["tried"]
    names_cause = tried["cause"] or tried["error"] is None
    return f"{_ended(tried, 'opened')}{', with the reason' if names_cause else ', no reason given'}"


def _open_kept(run: Run) -> bool:
    tried = run.facts["tried"]
    # "cannot" is said as soon as the reason is known, however long that takes. A resolver that
    # only fails for now is asked again until the timeout, and on a busy machine none may answer.
    passing = ("temporary failure", "no answer")
    return bool(
        tried["error"] == "OpenError"
        and tried["cause"]
        and (
            str(tried["message"]).startswith("cannot open")
            or any(words in str(tried["cause"]).lower() for words in passing)
        )
    )


def _open_text(run: Run) -> list[str]:
    tried = run.facts["tried"]
    only_log = tried["log"] if tried["error"] and not tried["cause"] else None
    return [*_text(tried), *([f"(in the log only) {only_log}"] if only_log else [])]


def _held(run: Run) -> str:
    tried = run.facts["tried"]
    named = sum(name in (tried["message"] or "") for name in ("report-7", "report-8"))
    return f"{_ended(tried, 'served')}; names {named} of 2 holders"


def _held_kept(run: Run) -> bool:
    tried = run.facts["tried"]
    return tried["error"] == "AcquireTimeout" and "report-7" in tried["message"]


def _killed(run: Run) -> str:
    attempts = run.facts["attempts"]
    return f"{sum(bool(tried['error']) for tried in attempts)} of {len(attempts)} requests failed"


def _killed_kept(run: Run) -> bool:
    return not any(tried["error"] for tried in run.facts["attempts"])


def _killed_text(run: Run) -> list[str]:
    failed = [tried for tried in run.facts["attempts"] if tried["error"]]
    return _text(failed[0]) if failed else []


def _outage(run: Run) -> str:
    return f"back {span(run.facts['seconds_late'])} after the server was"


def _outage_kept(run: Run) -> bool:
    return bool(run.facts["seconds_late"] <= 1.0)


def _close(run: Run) -> str:
    done = _ended(run.facts["tried"], f"returned after {span(run.facts['tried']['seconds'])}")
    return f"{done}; {run.facts['rows']} of 1 rows saved"


def _close_kept(run: Run) -> bool:
    return not run.facts["tried"]["error"] and run.facts["rows"] == 1


def _cancelled(run: Run) -> str:
    return f"{run.facts['usable']} of {run.facts['size']} connections left"


def _cancelled_kept(run: Run) -> bool:
    return bool(run.facts["usable"] == run.facts["size"])


def _settings(run: Run) -> str:
    text = f"left behind: {', '.join(run.facts['left']) or 'nothing'}"
    if "with_reset" in run.facts:
        cleared = ", ".join(run.facts["with_reset"]) or "nothing"
        text += f'; with reset="discard": {cleared}'
    return text


def _settings_kept(run: Run) -> bool:
    # PostgreSQL reports a change of search_path since 18, one of app.tenant never: those two
    # are what reset="discard" is for.
    return set(run.facts["left"]) <= {"search_path", "app.tenant"} and not run.facts["with_reset"]


MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        "One pool, two asyncio.run()",
        "Every asyncio.run() makes a new event loop. The pool is opened in the first and used in"
        " the second, where two requests need a second connection; the tasks that would make it"
        " ended with the first loop.",
        (Case("two_runs", "two asyncio.run()", _two_runs, _two_runs_kept, _two_runs_text),),
    ),
    Mistake(
        "The program fails while the pool connects",
        "main() opens the pool, without waiting for it, and raises ValueError: a setting is"
        " missing. A task of the pool swallows the one cancellation that asyncio.run() sends it"
        " before it shows the error.",
        (
            Case(
                "fails_while_connecting",
                "fails while connecting",
                _fails_while_connecting,
                _fails_while_connecting_kept,
                lambda run: [run.last_words] if run.last_words else [],
            ),
        ),
    ),
    Mistake(
        "A second event loop, in a thread",
        "A thread with a loop of its own asks for a connection and waits 1.5 s at most. The only"
        " one is given back, on the pool's own loop, after 0.3 s.",
        (
            Case(
                "second_loop",
                "second loop, in a thread",
                _second_loop,
                _second_loop_kept,
                _tried_text,
            ),
        ),
    ),
    Mistake(
        "A connection used on another loop",
        "A connection is checked out, handed to a thread, and used there on the thread's loop.",
        (
            Case(
                "connection_on_another_loop",
                "connection on another loop",
                _other_loop,
                _other_loop_kept,
                _tried_text,
            ),
        ),
    ),
    Mistake(
        "A pool opened before fork()",
        "As gunicorn --preload does. Parent and child each ask \"select '<own name> <number>'\""
        " for a second; both write to one socket, and whoever reads first has the answer.",
        (Case("fork", "fork()", _fork, _fork_kept, _fork_text),),
    ),
    Mistake(
        "A connection used after it was given back",
        "A task keeps its connection and calls rollback() later. By then the same session is"
        " another task's, in the middle of a transaction that it goes on to commit.",
        (Case("stale_rollback", "used after return", _stale, _stale_kept, _tried_text),),
    ),
    Mistake(
        "A connection given back twice",
        "putconn() is called again when another task has the session already. A third task then"
        " asks for a connection.",
        (Case("double_return", "returned twice", _double, _double_kept, _tried_text),),
    ),
    Mistake(
        "The server cannot be logged in to",
        "A role, a password, a database, a host that is wrong: open(wait=True), with a timeout of"
        " 1 s where 30 s is the default. The server, or the resolver, says so in milliseconds.",
        (
            Case("wrong_role", "wrong role", _open, _open_kept, _open_text),
            Case("wrong_password", "wrong password", _open, _open_kept, _open_text),
            Case("wrong_database", "wrong database", _open, _open_kept, _open_text),
            Case("wrong_host", "wrong host", _open, _open_kept, _open_text),
        ),
    ),
    Mistake(
        "Every connection is held",
        "Two tasks hold the two connections there are while they wait for something else. A third"
        " one asks, with a timeout of 1 s where 30 s is the default.",
        (Case("all_held", "every connection held", _held, _held_kept, _tried_text),),
    ),
    Mistake(
        "The server ends idle sessions",
        "As a restart, a failover or an administrator does. All four idle connections are dead;"
        " eight requests come one after the other.",
        (
            Case(
                "killed_idle",
                "idle sessions killed",
                _killed,
                _killed_kept,
                _killed_text,
            ),
        ),
    ),
    Mistake(
        "The server is away for 3.5 s",
        "Its sessions are ended, and new connections go to a port that refuses them; then it is"
        " back. A request waits for a connection from that moment on.",
        (Case("outage", "server away", _outage, _outage_kept, _nothing),),
    ),
    Mistake(
        "close() while a query runs",
        "A task has inserted a row and works on for half a second. The program calls close() and"
        " ends.",
        (Case("close_with_queries", "close() with a query", _close, _close_kept, _tried_text),),
    ),
    Mistake(
        "Tasks cancelled twice",
        "75 clients take two connections each, under a timeout within a timeout, for 2 s: some"
        " tasks are cancelled a second time while they give their connection back. The bare pool"
        " loses connections so on Python 3.11; on 3.12 and 3.13 that was not seen.",
        (Case("cancelled_twice", "cancelled twice", _cancelled, _cancelled_kept, _nothing),),
    ),
    Mistake(
        "Settings left behind",
        "One borrower sets autocommit, row_factory, TimeZone, search_path and app.tenant on its"
        " connection and gives it back. The next one looks. PoolManager is tried with"
        ' reset="discard" too.',
        (Case("settings_left", "settings left behind", _settings, _settings_kept, _nothing),),
    ),
)
