"""Uploads as configured. What they need is imported only where there is a bucket: it costs memory and start time.

Must never hold a rule of its own; it turns settings into the small configs of `managers.delivery`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from management_api.settings import Settings
from managers.clock import Clock
from managers.delivery.links import LinkConfig, Links
from managers.delivery.sqlite_uploads import SqliteUploads
from managers.events.types import Output
from managers.workflows.sqlite_store import SqliteStore

if TYPE_CHECKING:
    from managers.delivery.s3 import S3Destination
    from managers.delivery.s3_bucket import Bucket
    from managers.delivery.s3_uploader import Outputs

BEFORE_COMPLETE_SECONDS = 300.0


class Uploads:
    """What there is where a bucket is configured: links at once, the destination when the backends are there."""

    def __init__(self, settings: Settings, bucket: Bucket, *, store: SqliteStore, clock: Clock) -> None:
        self._settings = settings
        self._bucket = bucket
        self._store = store
        self._clock = clock
        self._books = SqliteUploads(store)
        self._destination: S3Destination | None = None
        self.links = Links(link_config(settings), signer=bucket, books=self._books, clock=clock)

    def destination(self, outputs: Outputs) -> S3Destination:
        """The one for the courier."""
        from managers.delivery.s3 import S3Destination
        from managers.delivery.s3_content import DownloadConfig
        from managers.delivery.s3_uploader import Uploader, UploaderConfig

        s3 = self._settings.s3
        config = UploaderConfig(
            prefix=s3.prefix,
            spool=self._settings.api.data_dir / "uploads",
            concurrency=s3.concurrency,
            download=DownloadConfig(
                timeout_seconds=s3.download_timeout_ms / 1000,
                retries=s3.download_retries,
                delay_seconds=s3.download_retry_delay_ms / 1000,
            ),
        )
        uploader = Uploader(
            config, bucket=self._bucket, books=self._books, links=self.links, outputs=outputs, clock=self._clock
        )
        self._destination = S3Destination(
            uploader, runs=self._store, outputs=outputs, parallel=s3.concurrency, delete_local=s3.delete_local
        )
        return self._destination

    async def before_complete(self, workflow_id: str, outputs: Sequence[Output]) -> None:
        """See `managers.workflows.linking.BeforeComplete`."""
        if self._destination is not None:
            await self._destination.before_complete(workflow_id, outputs, BEFORE_COMPLETE_SECONDS)


def make_uploads(settings: Settings, *, store: SqliteStore, clock: Clock) -> Uploads | None:
    """None without a bucket."""
    bucket = make_bucket(settings)
    return None if bucket is None else Uploads(settings, bucket, store=store, clock=clock)


def make_bucket(settings: Settings) -> Bucket | None:
    """The configured one."""
    if settings.s3.bucket is None:
        return None
    from managers.delivery.s3_bucket import Bucket, BucketConfig

    return Bucket(
        BucketConfig(
            bucket=settings.s3.bucket,
            region=settings.aws.region,
            endpoint=settings.s3.endpoint,
            public_endpoint=settings.s3.public_endpoint,
            access_key_id=settings.aws.access_key_id,
            secret_access_key=settings.aws.secret_access_key,
            session_token=settings.aws.session_token,
        )
    )


def link_config(settings: Settings) -> LinkConfig:
    """How links are made."""
    s3 = settings.s3
    base = s3.public_base or (f"https://{s3.cdn}" if s3.cdn else None)
    return LinkConfig(bucket=s3.bucket or "", base=base, ttl_seconds=s3.url_ttl)
