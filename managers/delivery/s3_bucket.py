"""A bucket of an S3-compatible store, through obstore. The only module that imports it, and is imported lazily.

Must never tell anybody what a store said word for word: signatures and key ids may be in it. `trouble` makes words of
our own of it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, BinaryIO

import obstore
from msgspec import Struct
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from managers.delivery.links import CannotSign

if TYPE_CHECKING:
    from obstore.store import RetryConfig

MULTIPART = 16 * 2**20
"""Bytes above which an object goes up in parts."""

_PART = 5 * 2**20  # the least that S3 allows; some 45 MiB of memory for an upload
_PARTS_AT_ONCE = 2
_MOST_PARTS = 9000  # of 10,000 that S3 allows
_SLOWEST = 128 * 1024  # bytes a second: what is slower counts as hanging
_SIGN_SECONDS = 5.0
_SHORT_SECONDS = 30.0

# Short: who is down for longer is for the courier to try again, over days.
_RETRY: RetryConfig = {
    "max_retries": 2,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=3)},
}


class BucketConfig(Struct, frozen=True, kw_only=True):
    """Where it is, and who we are there. Without keys the usual AWS chain counts: environment, web identity,
    container, instance. `public_endpoint` is what links name; None: as `endpoint`, and without one AWS itself.
    """

    bucket: str
    region: str
    endpoint: str | None = None
    public_endpoint: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None


class BucketTrouble(CannotSign):
    """It did not work, and may another time. The words are our own."""


class Bucket:
    """Puts objects there, and signs links to them."""

    def __init__(self, config: BucketConfig) -> None:
        self.name = config.bucket
        self._config = config
        self._store = _store(config, config.bucket, config.endpoint)
        self._signers: dict[str, S3Store] = {}

    async def put(self, key: str, body: bytes | BinaryIO, *, size: int, attributes: dict[str, str]) -> None:
        """Store an object, whole or not at all; `size` in bytes. Raises `BucketTrouble`."""
        multipart = size > MULTIPART
        seconds = _SHORT_SECONDS * 4 + size / _SLOWEST
        async with _told(seconds):
            await obstore.put_async(
                self._store,
                key,
                body,
                attributes=attributes,
                use_multipart=multipart,
                chunk_size=max(_PART, -(-size // _MOST_PARTS)),
                max_concurrency=_PARTS_AT_ONCE,
            )

    async def delete(self, key: str) -> None:
        """Raises `BucketTrouble`."""
        async with _told(_SHORT_SECONDS):
            await obstore.delete_async(self._store, key)

    async def sign(self, bucket: str, keys: Sequence[str], seconds: int) -> Sequence[str]:
        """Links that read these objects for so many seconds, at the public endpoint. Raises `BucketTrouble`."""
        if bucket not in self._signers:
            public = self._config.public_endpoint or self._config.endpoint
            self._signers[bucket] = _store(self._config, bucket, public)
        async with _told(_SIGN_SECONDS):
            return await obstore.sign_async(self._signers[bucket], "GET", list(keys), timedelta(seconds=seconds))


def _store(config: BucketConfig, bucket: str, endpoint: str | None) -> S3Store:
    given = {
        "access_key_id": config.access_key_id,
        "secret_access_key": config.secret_access_key,
        "session_token": config.session_token,
        "endpoint": endpoint,
    }
    return S3Store(
        bucket,
        region=config.region,
        # The name of a bucket with dots fits no certificate; other stores rarely have a name for each bucket.
        virtual_hosted_style_request=endpoint is None and "." not in bucket,
        client_options={
            "connect_timeout": timedelta(seconds=5),
            "timeout": timedelta(seconds=150),
            "allow_http": bool(endpoint and endpoint.startswith("http:")),
        },
        retry_config=_RETRY,
        **{name: value for name, value in given.items() if value},  # type: ignore[arg-type]
    )


@asynccontextmanager
async def _told(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise BucketTrouble(f"the store did not answer within {seconds:.0f} s") from error
    except (BaseError, FileNotFoundError, ValueError) as error:
        raise BucketTrouble(trouble(error)) from None  # its text has what nobody is to read


def trouble(error: Exception) -> str:
    """What obstore says, in a few words that hold no secret."""
    text = str(error)
    status = re.search(r"status code: (\d{3})", text)
    code = re.search(r"<Code>([A-Za-z0-9.]{1,64})</Code>", text)
    if status or code:
        said = " ".join(found[1] for found in (status, code) if found)
        if isinstance(error, PermissionDeniedError | UnauthenticatedError):
            return f"the store refuses our credentials: {said}"
        return f"the store answers {said}"
    if "169.254." in text or "latest/api/token" in text or "credential" in text.lower():
        return "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if "timed out" in text.lower() or "Timeout" in text:
        return "the store did not answer in time"
    if "error sending request" in text or "Connect" in text:
        return "the store cannot be reached"
    return f"the store failed ({type(error).__name__})"
