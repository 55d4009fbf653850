"""Ids in paths: what is no canonical UUID names nothing, so it is a 404 like any unknown one (CONTRACT 2)."""

from __future__ import annotations

import re

from managers.errors import NotFound

UUID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"

_is_uuid = re.compile(UUID).fullmatch


def known(one: str, what: str = "Workflow") -> str:
    """The id, if it can be one. Raises `NotFound`: what is no UUID names nothing (CONTRACT 2)."""
    if not _is_uuid(one):
        raise NotFound(f"{what} {one[:64]!r} not found: an id is a lower-case UUID")
    return one
