"""The inputs of workflows as configured.

Must never hold a rule of its own; it turns settings into the small configs of `managers.comfyui`.
"""

from __future__ import annotations

from collections.abc import Callable

from management_api import __version__
from management_api.settings import Settings
from managers.comfyui.catalogs import Catalogs
from managers.comfyui.fetching import FetchConfig, Fetcher
from managers.comfyui.inputs import ClassOf
from managers.comfyui.preparing import InputConfig, Inputs
from managers.guard import Guard


def make_inputs(settings: Settings, catalogs: Callable[[], Catalogs]) -> Inputs:
    """Those who put them in place; `catalogs` is asked when all have met."""
    fetcher = Fetcher(
        Guard(allow_private=settings.inputs.allow_private),
        FetchConfig(
            timeout_seconds=settings.s3.download_timeout_ms / 1000,
            retries=settings.s3.download_retries,
            delay_seconds=settings.s3.download_retry_delay_ms / 1000,
            agent=f"comfyui-management-api/{__version__}",
        ),
    )

    async def classes(backend: str) -> ClassOf:
        await catalogs().current((backend,))
        return catalogs().node_class

    config = InputConfig(spool=settings.api.data_dir / "inputs", max_bytes=settings.inputs.max_bytes)
    return Inputs(config, fetcher=fetcher, classes=classes)
