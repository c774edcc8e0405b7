"""
The way to a server, as ``poolkeeper doctor`` goes it: its name, its addresses, the port, TLS.

As libpq goes it, but for the login, which is libpq's own affair: what it says of TLS is one
sentence for all that may be wrong with a certificate.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from .doctor import Step

Params: TypeAlias = Mapping[str, str]
Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]

DIRECTORIES = ("/var/run/postgresql", "/tmp")
"""Where libpq looks for a socket if no host is given; which of them is compiled into it."""

SOON = 14
"""Days before its end from which a certificate is said to be old."""


class Server(NamedTuple):
    """One of those in the connection string."""

    name: str
    """What its certificate is to have; "" if nobody has said."""
    address: str
    """Where to go: a name, an address, or the directory of a socket; "" for libpq's own choice."""
    port: str

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


def servers(params: Params) -> Iterator[Server]:
    """Return those of the connection string, in its order."""
    names = (params.get("host") or "").split(",")
    addresses = (params.get("hostaddr") or "").split(",")
    ports = (params.get("port") or "5432").split(",")
    for number in range(max(len(names), len(addresses))):
        name = names[number].strip() if len(names) > number else ""
        address = addresses[number].strip() if len(addresses) > number else ""
        port = ports[number if len(ports) > number else 0].strip() or "5432"
        if not name and not address and not hasattr(socket, "AF_UNIX"):
            name = "localhost"
        yield Server(name, address or name, port)


def is_here(host: str) -> bool:
    """Tell whether *host* is this machine, as far as its name says so."""
    if host.startswith(("/", "@")) or host == "localhost":
        return True
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return False


async def way_to(
    server: Server, params: Params, timeout: float
) -> AsyncIterator[tuple[Step, bool]]:
    """Go to one server, as far as it goes; with each step, whether it can be talked to."""
    if not server.address or server.address.startswith(("/", "@")):
        step = await _socket(server, timeout)
        yield step, step.ok is True
        return
    addresses: list[str] = []
    yield await _dns(server, addresses, timeout), False
    opened: list[Streams] = []
    for step, streams in await _tcp(server, addresses, timeout):
        yield step, False
        if streams is not None:
            opened.append(streams)
    try:
        for streams in opened:
            yield await _tls(server, streams, params, timeout)
    finally:
        for _, writer in opened:
            writer.close()
            with suppress(OSError, ssl.SSLError):
                await writer.wait_closed()


def since(began: float) -> float:
    """Return seconds."""
    return time.perf_counter() - began


def _why(error: BaseException, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    code = getattr(error, "errno", None)
    # Not its strerror: of asyncio's own that has the address once more.
    known = os.strerror(code) if isinstance(code, int) and code > 0 else ""
    return (known or getattr(error, "strerror", None) or str(error)).lower()


# --- a socket, a name, a port ---------------------------------------------------------------------


def _paths(server: Server) -> list[str]:
    """Return where its socket may be, first that which is there."""
    directories = [server.address] if server.address else DIRECTORIES
    paths = [f"{directory}/.s.PGSQL.{server.port}" for directory in directories]
    return sorted(paths, key=lambda path: not Path(path).exists())


async def _socket(server: Server, timeout: float) -> Step:
    given = server.address
    paths = _paths(server)
    path = paths[0]
    began = time.perf_counter()
    try:
        async with asyncio.timeout(timeout):
            address = f"\0{path[1:]}" if path.startswith("@") else path
            _, writer = await asyncio.open_unix_connection(address)
    except OSError as error:
        where = " or ".join(paths)
        advice = "Check the directory and the port, and that the server runs."
        if not given:
            advice = "No host is given, nor DATABASE_URL or PGHOST: is that meant?"
        return Step("socket", False, f"{where}: {_why(error, timeout)}", advice, since(began))
    writer.close()
    said = f"a Unix socket, {path}: no DNS, no TCP and no TLS"
    return Step("socket", True, said, "", since(began))


async def _dns(server: Server, addresses: list[str], timeout: float) -> Step:
    """Resolve the name, into *addresses*."""
    host = server.address
    with suppress(ValueError):
        addresses.append(str(ip_address(host)))
        return Step("DNS", True, f"{host} is an address, and no name")
    began = time.perf_counter()
    try:
        async with asyncio.timeout(timeout):
            found = await asyncio.get_running_loop().getaddrinfo(
                host, int(server.port), type=socket.SOCK_STREAM
            )
    except (OSError, UnicodeError) as error:
        said = f"{host} cannot be resolved: {_why(error, timeout)}"
        advice = "Check the host in the connection string, and that this machine can resolve it."
        return Step("DNS", False, said, advice, since(began))
    addresses += dict.fromkeys(str(address[4][0]) for address in found)
    return Step("DNS", True, f"{host} is {', '.join(addresses)}", "", since(began))


async def _tcp(
    server: Server, addresses: list[str], timeout: float
) -> list[tuple[Step, Streams | None]]:
    """
    Open a connection to each address.

    One that refuses costs nothing where another one takes its place: a "localhost" that is an
    address of IPv6, too, say, where the server listens on that of IPv4.
    """
    tried: list[tuple[str, float, Streams | OSError]] = []
    for address in addresses:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(timeout):
                streams = await asyncio.open_connection(address, int(server.port))
        except OSError as error:
            tried.append((address, since(began), error))
        else:
            tried.append((address, since(began), streams))
    one_is_open = any(not isinstance(ended, OSError) for _, _, ended in tried)
    told: list[tuple[Step, Streams | None]] = []
    for address, seconds, ended in tried:
        where = f"{address}, port {server.port}"
        if not isinstance(ended, OSError):
            told.append((Step("TCP", True, f"{where} is open", "", seconds), ended))
            continue
        refused = isinstance(ended, ConnectionRefusedError)
        advice = _ADVICE_FOR_TCP.get(type(ended), "Check host and port, and what stands between.")
        if refused and one_is_open:
            advice = "Another address of this host is taken instead."
        ok = None if refused and one_is_open else False
        told.append((Step("TCP", ok, f"{where}: {_why(ended, timeout)}", advice, seconds), None))
    return told


_ADVICE_FOR_TCP: dict[type[BaseException], str] = {
    ConnectionRefusedError: (
        "Nobody listens there: check the port, that the server runs, and listen_addresses."
    ),
    TimeoutError: "Packets are dropped on the way: look for a firewall, a security group, a VPN.",
}


# --- TLS ------------------------------------------------------------------------------------------

_SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"

_WITHOUT = ("disable", "allow")
_REQUIRED = ("require", "verify-ca", "verify-full")


async def _tls(
    server: Server, streams: Streams, params: Params, timeout: float
) -> tuple[Step, bool]:
    """Ask whether the server takes TLS, and begin it as libpq would; tell whether it answers."""
    began = time.perf_counter()
    mode = params.get("sslmode", "prefer")
    try:
        async with asyncio.timeout(timeout):
            answer = await _offer(streams, params)
    except OSError as error:
        said = f"{server} takes connections and says nothing: {_why(error, timeout)}"
        return Step("TLS", False, said, "Check that it is a PostgreSQL, and not stuck."), False
    if answer not in (b"S", b"N"):
        said = f"{server} does not answer as PostgreSQL does"
        advice = "Check host and port: it is something else, or full."
        return Step("TLS", False, said, advice), False
    if answer == b"N" or mode in _WITHOUT:
        said = f"{server} offers {'TLS' if answer == b'S' else 'no TLS'}, sslmode={mode}"
        if mode in _REQUIRED:
            advice = "Turn ssl on at the server, or lower sslmode."
            return Step("TLS", False, said, advice, since(began)), True
        return Step("TLS", True, said, _of_trust(server, mode), since(began)), True
    try:
        async with asyncio.timeout(timeout):
            said, advice = await _handshake(server, streams[1], params, mode)
    except _Untrusted as error:
        said, advice = error.args
    except OSError as error:
        said = f"no TLS could be agreed on: {_tls_error(error, timeout)}"
        advice = "Check ssl_min_protocol_version and ssl_ciphers at the server."
    else:
        return Step("TLS", True, f"{server} offers {said}", advice, since(began)), True
    if mode == "prefer":
        advice = f"sslmode=prefer goes on without TLS. {advice}"
    return Step("TLS", mode == "prefer", f"{server}: {said}", advice, since(began)), True


async def _offer(streams: Streams, params: Params) -> bytes:
    """Return one letter: whether the server takes TLS."""
    if params.get("sslnegotiation") == "direct":
        return b"S"  # it is not asked
    reader, writer = streams
    writer.write(_SSL_REQUEST)
    return await reader.read(1)


def _of_trust(server: Server, mode: str) -> str:
    if mode == "verify-full" or is_here(server.name or server.address):
        return ""
    return "Only sslmode=verify-full, with sslrootcert, makes sure whom you talk to."


class _Untrusted(Exception):
    """The two will not agree on TLS; with what is wrong, and what to do."""


async def _handshake(
    server: Server, writer: asyncio.StreamWriter, params: Params, mode: str
) -> tuple[str, str]:
    """
    Begin TLS; return what was found, and what to do about it.

    Raises:
        _Untrusted: If the server is not to be trusted, or nobody says by whom it would be.
        OSError: If it ends otherwise; `ssl.SSLError` is one.
    """
    context, authority = _context(server, params, mode)
    try:
        await writer.start_tls(context, server_hostname=server.name or None)
    except ssl.SSLCertVerificationError as error:
        raise _Untrusted(*_of_certificate(error, server, authority)) from error
    tls = writer.get_extra_info("ssl_object")
    said = f"{str(tls.version()).replace('v', ' ')}, sslmode={mode}"
    cert: dict[str, Any] = tls.getpeercert() or {}
    if "notAfter" not in cert:
        return f"{said}: its certificate was not looked at", _of_trust(server, mode)
    ends = ssl.cert_time_to_seconds(str(cert["notAfter"]))
    days = int((ends - time.time()) // 86400)
    said += f"; its certificate is good until {time.strftime('%Y-%m-%d', time.gmtime(ends))}"
    if days < SOON:
        return said, f"That is in {days} days: have it renewed."
    return said, _of_trust(server, mode)


def _context(server: Server, params: Params, mode: str) -> tuple[ssl.SSLContext, str]:
    """Return what is asked of a certificate, and who has to have signed it, in words."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = mode == "verify-full"
    if context.check_hostname and not server.name:
        raise _Untrusted(
            "sslmode=verify-full needs the name of the host, and there is hostaddr only",
            "Give host= beside it.",
        )
    if params.get("sslnegotiation") == "direct":
        context.set_alpn_protocols(["postgresql"])
    authority = params.get("sslrootcert") or str(Path.home() / ".postgresql" / "root.crt")
    if authority == "system":
        context.load_default_certs()
        return context, "the authorities of this system"
    if not Path(authority).exists():
        if mode.startswith("verify"):
            raise _Untrusted(
                f"sslmode={mode} needs to know who signs certificates, and there is no {authority}",
                "sslrootcert=FILE names the certificate of the CA, sslrootcert=system those that"
                " this system trusts.",
            )
        context.verify_mode = ssl.CERT_NONE
        return context, ""
    try:
        context.load_verify_locations(authority)
    except OSError as error:
        raise _Untrusted(
            f"sslrootcert, {authority}, cannot be read: {error.strerror or error}",
            "It has to be the certificate of a CA, in PEM.",
        ) from error
    return context, authority


# Of X509_verify_cert(3).
_NOT_YET, _EXPIRED, _OTHER_HOST, _OTHER_ADDRESS = 9, 10, 62, 64
_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)


def _of_certificate(
    error: ssl.SSLCertVerificationError, server: Server, authority: str
) -> tuple[str, str]:
    """Return what is wrong with a certificate, and what to do."""
    code = error.verify_code
    if code in _UNKNOWN_AUTHORITY:
        return (
            f"its certificate is not signed by {authority}",
            "Give the certificate of the CA that has signed it: sslrootcert=FILE.",
        )
    if code in (_OTHER_HOST, _OTHER_ADDRESS):
        return (
            f"its certificate is not for {server.name}",
            "Call the host what the certificate calls it (hostaddr= says where it is), or have one"
            f" made for {server.name}.",
        )
    if code == _EXPIRED:
        return "its certificate has expired", "Have it renewed, and the server reload it."
    if code == _NOT_YET:
        return "its certificate is not valid yet", "Set the clock of this machine right, or wait."
    return f"its certificate is not good: {error.verify_message}", "Have one made that is."


def _tls_error(error: OSError, timeout: float) -> str:
    if reason := getattr(error, "reason", None):
        return str(reason).replace("_", " ").lower()
    return _why(error, timeout) or "the connection was closed"
