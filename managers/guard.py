"""Keeps requests to addresses that strangers name out of our own network (SSRF).

A name is resolved once for each connection, every address it has is checked, and the connection goes to one of those
very addresses: an answer that is another the second time changes nothing. TLS and `Host` still name the host. Must
never follow a redirect, use a proxy of the environment, or tell which address a name has.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_network
from urllib.parse import urlsplit

import httpcore
import httpx
from httpcore import AsyncNetworkBackend, AsyncNetworkStream

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

MAX_URL = 2048

# IANA's special-purpose registries, written out: what Python calls private changes from version to version.
_NEVER = tuple(
    map(
        ip_network,
        (
            *("0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.51.100.0/24", "203.0.113.0/24"),
            "100.100.100.200/32",  # metadata of Alibaba Cloud
            "168.63.129.16/32",  # the inside of Azure
            *("::/128", "fe80::/10", "fec0::/10", "ff00::/8", "100::/64", "2001::/23", "2001:db8::/32"),
            *("3fff::/20", "5f00::/16", "64:ff9b:1::/48"),
            *("fd00:ec2::/32", "fd20:ce::/32"),  # metadata of AWS and of Google Cloud
        ),
    )
)
_PRIVATE = tuple(
    map(
        ip_network,
        (
            *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "100.64.0.0/10", "198.18.0.0/15"),
            *("::1/128", "fc00::/7"),
        ),
    )
)
_GLOBAL = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_COMPATIBLE = IPv6Network("::/96")
_SIX_TO_FOUR = IPv6Network("2002::/16")


class Forbidden(Exception):
    """The guard lets nothing there; the message says why, without an address that was not in the URL."""


class Unresolved(Exception):
    """The name has no address, or nobody could tell."""


def forbidden(address: Address, *, allow_private: bool = False) -> str | None:
    """What is wrong with this address, in a word; None: it may be called.

    `allow_private` opens private networks and loopback, never metadata services, link-local, multicast or reserved
    addresses. IPv4 addresses inside IPv6 ones (mapped, compatible, NAT64, 6to4) are judged as what they are.
    """
    inner = _embedded(address)
    if inner is not None:
        return forbidden(inner, allow_private=allow_private)
    if any(address in network for network in _PRIVATE) and not _is_never(address):
        return None if allow_private else "private"
    if _is_never(address) or (isinstance(address, IPv6Address) and address not in _GLOBAL):
        return "reserved"
    return None


def _is_never(address: Address) -> bool:
    return any(address in network for network in _NEVER)


def _embedded(address: Address) -> IPv4Address | None:
    if isinstance(address, IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _SIX_TO_FOUR:
        return address.sixtofour
    return None


async def resolve_by_system(host: str, port: int) -> Sequence[str]:
    """What the system says. On a thread of its own: a name server that hangs takes no thread from anybody else, and
    none that a shutdown would wait for. Raises `Unresolved`.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Sequence[str]] = loop.create_future()

    def tell(addresses: Sequence[str]) -> None:
        if not answer.done():
            answer.set_result(addresses)

    def ask() -> None:
        addresses: Sequence[str] = ()
        with suppress(OSError, UnicodeError):
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        with suppress(RuntimeError):  # nobody waits any more: the loop is closed
            loop.call_soon_threadsafe(tell, addresses)

    threading.Thread(target=ask, name="resolver", daemon=True).start()
    addresses = await answer
    if not addresses:
        raise Unresolved("The host cannot be resolved")
    return addresses


class Guard:
    """Knows where requests may go. `allow_private`: also to private networks and this machine, for a lab."""

    def __init__(self, *, allow_private: bool = False, resolve: Resolve = resolve_by_system) -> None:
        self.allow_private = allow_private
        self._resolve = resolve

    async def check(self, url: str, seconds: float = 5.0) -> None:
        """Whether this URL may be called as things are now. One that cannot be resolved now may be so later.

        Raises `Forbidden`, with a sentence for who named it.
        """
        host, port = split(url)
        with suppress(Unresolved, TimeoutError):
            async with asyncio.timeout(seconds):
                await self.addresses(host, port)

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """The addresses of this host, all of them checked. Raises `Forbidden`, `Unresolved`."""
        try:
            literal = ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            found = await self._resolve(host, port)
        else:
            found = [str(literal)]
        for text in found:
            wrong = forbidden(ipaddress.ip_address(text), allow_private=self.allow_private)
            if wrong is not None:
                raise Forbidden(f"The address of this host is {wrong}, and nothing may be sent there")
        return found

    def transport(self, context: ssl.SSLContext, **pool: int | None) -> httpx.AsyncBaseTransport:
        """For an httpx client (with `follow_redirects=False`): connects only where it may. Each request resolves and
        checks anew; no connection is kept. The httpx errors are as always, and `Forbidden`, `Unresolved`.
        """
        return _GuardedTransport(self, context, **pool)


def split(url: str) -> tuple[str, int]:
    """Host and port. Raises `Forbidden` for what is no plain http or https URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        raise Forbidden("This is not a URL") from None
    if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise Forbidden(f"A URL has up to {MAX_URL} characters, all of them ASCII, without spaces")
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        raise Forbidden("A URL begins with https:// or http:// and names a host")
    if parts.username is not None or parts.password is not None:
        raise Forbidden("A URL carries no user and password: signatures show who calls")
    if parts.fragment:
        raise Forbidden("A URL has no fragment (#…): it would not be sent")
    return parts.hostname, port or (443 if parts.scheme == "https" else 80)


class _Network(AsyncNetworkBackend):
    """Connects to addresses that were checked, one after the other."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> AsyncNetworkStream:
        """Resolve, check, connect."""
        failure: Exception | None = None
        for address in await self._guard.addresses(host, port):
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure or Unresolved("The host cannot be resolved")

    async def connect_unix_socket(
        self,
        path: str,  # noqa: ARG002
        timeout: float | None = None,  # noqa: ARG002, ASYNC109
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,  # noqa: ARG002
    ) -> AsyncNetworkStream:
        """Never."""
        raise Forbidden("Sockets of this machine are not called")

    async def sleep(self, seconds: float) -> None:
        """As httpcore wants it."""
        await asyncio.sleep(seconds)


class _GuardedTransport(httpx.AsyncHTTPTransport):
    """httpx's own, over a pool that connects through the guard: httpcore has a place for that, httpx has none."""

    def __init__(self, guard: Guard, context: ssl.SSLContext, **pool: int | None) -> None:
        super().__init__(verify=context, trust_env=False)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            network_backend=_Network(guard),
            max_connections=pool.get("max_connections"),
            max_keepalive_connections=0,
        )


class GuardedClient:
    """An httpx client behind the guard, made when it is first wanted: reading the certificates takes 50 ms.

    It follows no redirect and keeps nothing of the environment.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        seconds: float,
        context: ssl.SSLContext | None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`seconds` for each step of a request; `context`: certificates that are trusted, None: the system's."""
        self._guard = guard
        self._seconds = seconds
        self._context = context
        self._headers = headers
        self._client: httpx.AsyncClient | None = None
        self._making = asyncio.Lock()

    async def get(self) -> httpx.AsyncClient:
        """The client."""
        async with self._making:
            if self._client is None:
                context = self._context
                if context is None:
                    context = await asyncio.to_thread(httpx.create_ssl_context, trust_env=False)
                self._client = httpx.AsyncClient(
                    transport=self._guard.transport(context),
                    timeout=httpx.Timeout(self._seconds),
                    headers=self._headers,
                    follow_redirects=False,
                    trust_env=False,
                )
            return self._client

    async def aclose(self) -> None:
        """Close what is open."""
        if self._client is not None:
            await self._client.aclose()
