"""EventBridge as configured. Without a bus nothing of AWS is imported.

Must never hold a rule of its own; it turns settings into the small config of `managers.delivery.eventbridge`.
"""

from __future__ import annotations

from collections.abc import Mapping

from management_api import __version__
from management_api.settings import Settings
from managers.clock import Clock
from managers.delivery.eventbridge import Dress, EventBridge, EventBridgeConfig, Records, Teller
from managers.delivery.eventbridge_bus import BusConfig
from managers.events.hub import Hub


def make_eventbridge(
    settings: Settings,
    *,
    records: Records,
    hub: Hub,
    clock: Clock,
    client_ids: Mapping[str, str],
    dress: Dress | None = None,
) -> EventBridge | None:
    """None without a bus. `client_ids` by backend; `dress` puts links into stored events when they are told.

    Raises `MissingExtra`.
    """
    told, aws = settings.eventbridge, settings.aws
    if told.bus_name is None:
        return None
    bus = BusConfig(
        name=told.bus_name,
        region=aws.region,
        endpoint_url=told.endpoint,
        access_key_id=aws.access_key_id,
        secret_access_key=aws.secret_access_key,
        session_token=aws.session_token,
    )
    return EventBridge(
        EventBridgeConfig(bus=bus, naming=told.naming, progress_seconds=told.progress_seconds),
        records=records,
        hub=hub,
        clock=clock,
        backends=[Teller(name=name, client_id=client_id) for name, client_id in client_ids.items()],
        version=__version__,
        dress=dress,
    )
