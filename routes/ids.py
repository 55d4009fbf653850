"""Ids in paths: what is no canonical UUID names nothing, so it is a 404 like any unknown one (CONTRACT 2)."""

from __future__ import annotations

import re

from managers.errors import NotFound

UUID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"

_is_uuid = re.compile(UUID).fullmatch


def known(workflow_id: str) -> str:
    """The id, if it can be one. Raises `NotFound`: what is no UUID names no workflow (CONTRACT 2)."""
    if not _is_uuid(workflow_id):
        raise NotFound(f"Workflow {workflow_id[:64]!r} not found: an id is a lower-case UUID")
    return workflow_id
