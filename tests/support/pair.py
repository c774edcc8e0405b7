"""A primary and its standby: real servers, with a real fail-over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from poolkeeper._embedded import EmbeddedServer
from tests.support.embedded import OwnServer
from tests.support.server import admin
from tests.support.waiting import eventually


class Standby(EmbeddedServer):
    """A streaming standby of *primary*, which runs."""

    def __init__(self, primary: EmbeddedServer) -> None:
        self._primary = primary
        super().__init__()

    def _make_data(self) -> None:
        source = self._primary.dsn()
        options = "--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "--no-sync"
        self._run("pg_basebackup", *options, f"--dbname={source}")

    def promote(self) -> None:
        """Make it the primary, and return when it takes writes."""
        self._run("pg_ctl", "promote", "-w")


class Pair:
    """
    A primary with the table ``written``, and its standby.

    Attributes:
        primary: The primary, at first.
        standby: Its standby, until it is promoted.
    """

    def __init__(self, primary: EmbeddedServer, standby: Standby) -> None:
        self.primary = primary
        self.standby = standby

    def dsn(self, target_session_attrs: str, *, standby_first: bool = False) -> str:
        """Return a conninfo that lists both."""
        ports = [self.primary.port, self.standby.port]
        if standby_first:
            ports.reverse()
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        return f"postgresql://postgres@{hosts}/postgres?target_session_attrs={target_session_attrs}"

    def freeze(self) -> None:
        """Let the primary take no more writes; its sessions live on."""
        set_read_only(self.primary, True)

    def switch_over(self) -> None:
        """Freeze the primary and promote the standby, as for maintenance."""
        self.freeze()
        self.standby.promote()


@contextmanager
def pair() -> Iterator[Pair]:
    """Start both; the standby has all that the primary has."""
    with OwnServer({"max_connections": 50}) as primary:
        admin(primary.dsn(), "create table written (n bigint)")
        with Standby(primary) as standby:
            assert eventually(lambda: admin(standby.dsn(), "select pg_is_in_recovery()")[0][0])
            yield Pair(primary, standby)


def set_read_only(server: EmbeddedServer, on: bool) -> None:
    """Set what an administrator sets to freeze writes, or lift it, and see that it holds."""
    value = "on" if on else "off"
    admin(server.dsn(), f"alter system set default_transaction_read_only = {value}")
    server.reload()
    assert eventually(
        lambda: admin(server.dsn(), "show default_transaction_read_only") == [(value,)]
    )
