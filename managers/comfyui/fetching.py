"""Fetches what a URL names, on the word of a stranger: guarded, limited in size and in time.

Must never tell more of the URL than its host (the rest may be a secret), follow a redirect without asking the guard
again, or believe what a server says of length and type.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

import httpx
import structlog
from msgspec import Struct

from managers.comfyui.spool import Spool
from managers.errors import TooLarge
from managers.guard import Forbidden, Guard, GuardedClient, Unresolved, split

log = structlog.get_logger(__name__)

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_GRACE = 4  # times the time of silence, and then
_SLOWEST = 512 * 1024  # bytes a second: a backend may stand idle meanwhile


class FetchConfig(Struct, frozen=True, kw_only=True):
    """Seconds of silence that are borne, and how often a failure that may pass is tried again after what delay."""

    timeout_seconds: float = 7.0
    retries: int = 2
    delay_seconds: float = 0.75
    agent: str = "comfyui-management-api"


class NotFetched(Exception):
    """It cannot be had; the message goes on after `cannot be fetched: `."""


class _Failure(Exception):
    """It may be another time."""


class Fetcher:
    """Makes GET requests. It keeps no connection."""

    def __init__(self, guard: Guard, config: FetchConfig, *, context: ssl.SSLContext | None = None) -> None:
        """`context` says which certificates are trusted, None: those of the system."""
        self._config = config
        self._client = GuardedClient(
            guard,
            seconds=config.timeout_seconds,
            context=context,
            # Whole as it is: what is packed could be any size unpacked.
            headers={"user-agent": config.agent, "accept": "*/*", "accept-encoding": "identity"},
        )

    async def aclose(self) -> None:
        """Close what is open."""
        await self._client.aclose()

    async def fetch(self, url: str, new_spool: Callable[[], Spool]) -> Spool:
        """The bytes there, for the caller to close. Raises `NotFetched`, `Unavailable` when our disk fails."""
        failures = 0
        while True:
            spool = new_spool()
            try:
                await self._fetch(url, spool)
            except _Failure as failure:
                spool.close()
                failures += 1
                if failures > self._config.retries:
                    raise NotFetched(str(failure)) from None
                log.info(
                    "an input could not be fetched, trying again", host=urlsplit(url).hostname, reason=str(failure)
                )
                await asyncio.sleep(self._config.delay_seconds)
            except BaseException:
                spool.close()
                raise
            else:
                return spool

    async def _fetch(self, url: str, spool: Spool) -> None:
        client = await self._client.get()
        grace = self._config.timeout_seconds * _GRACE
        try:
            async with asyncio.timeout(grace) as leash:
                for _ in range(_MOST_REDIRECTS + 1):
                    split(url)
                    async with client.stream("GET", url) as reply:
                        if reply.status_code not in _REDIRECTS or "location" not in reply.headers:
                            return await self._read(reply, spool, leash, grace)
                        url = urljoin(url, reply.headers["location"]).partition("#")[0]
        except TimeoutError:
            raise NotFetched(f"it comes too slowly: {spool.size} bytes so far") from None
        except (Forbidden, TooLarge) as error:
            raise NotFetched(_sentence(error)) from None
        except Unresolved as error:
            raise _Failure(_sentence(error)) from None
        except httpx.TimeoutException:
            raise _Failure(f"nothing came for {self._config.timeout_seconds:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise _Failure(_plain(error)) from None
        raise NotFetched(f"it was sent elsewhere more than {_MOST_REDIRECTS} times")

    async def _read(self, reply: httpx.Response, spool: Spool, leash: asyncio.Timeout, grace: float) -> None:
        if reply.status_code in _AGAIN:
            raise _Failure(f"the answer was {reply.status_code}")
        if reply.status_code != 200:
            raise NotFetched(f"the answer was {reply.status_code}")
        length = reply.headers.get("content-length", "")
        if length.isascii() and length.isdigit():
            spool.announce(int(length))
        began = asyncio.get_running_loop().time()
        async for piece in reply.aiter_raw():
            await spool.write(piece)
            leash.reschedule(began + grace + spool.size / _SLOWEST)


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].lower() + text[1:]


def _plain(error: Exception) -> str:
    """Without addresses, which the messages of the system may hold."""
    match error:
        case httpx.ConnectError():
            return "no connection"
        case httpx.RemoteProtocolError() | httpx.ReadError():
            return "the connection broke, or what answers speaks no HTTP"
        case _:
            return f"the request failed: {type(error).__name__}"
