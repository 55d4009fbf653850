"""Where templates are kept: the port of the registry.

Must never let a version change, nor give a number twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from managers.templates.model import Definition, Head, Source, Version


class Statistics(Struct, frozen=True, kw_only=True, rename="camel"):
    """What became of the workflows that were made from a version, as far as they are kept.

    `runs` have ended, cancelled ones apart. Seconds are those of execution, of the newest thousand that completed.
    """

    runs: int = 0
    failures: int = 0
    p50_seconds: float | None = None
    p95_seconds: float | None = None


class Found(Struct, frozen=True):
    """A definition that lay in a file or in the box."""

    name: str
    definition: Definition


class TemplateStore(Protocol):
    """One implementation: `sqlite_templates`."""

    async def heads(self) -> Mapping[str, Head]:
        """All templates, by name."""
        ...

    async def save(self, name: str, definition: Definition, *, saved_by: str, now: int) -> Version:
        """Keep it as the newest version."""
        ...

    async def settle(self, found: Sequence[Found], source: Source, now: int) -> Sequence[Version]:
        """Save what is not what this source gave last; from the box only where it is still that of the box."""
        ...

    async def version(self, name: str, number: int) -> Version | None:
        """One of them."""
        ...

    async def versions(self, name: str) -> Sequence[Version]:
        """All that are kept, the newest first."""
        ...

    async def set_alias(self, name: str, alias: str, number: int) -> bool:
        """Let the alias name this version. False: there is none."""
        ...

    async def delete(self, name: str) -> bool:
        """Remove its versions and aliases. False: there were none."""
        ...

    async def statistics(self, name: str) -> Mapping[int, Statistics]:
        """By version; those that were never run are left out."""
        ...
