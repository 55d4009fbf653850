"""The Prefer header (RFC 7240): what a client would like, where it is no error not to give it."""

from __future__ import annotations

import re

from msgspec import Struct

MAX_WAIT_SECONDS = 300


class Preferences(Struct, frozen=True):
    """What the client prefers (RFC 7240): how long to wait for the end, in seconds, and strict handling."""

    wait: float | None = None
    strict: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """`Preference-Applied`, when there was any that we know."""
        named = [f"wait={self.wait:g}"] if self.wait is not None else []
        applied = ", ".join([*named, "handling=strict"] if self.strict else named)
        return {"preference-applied": applied} if applied else {}


def preferences(header: str | None) -> Preferences:
    """Read a Prefer header; preferences that we do not know are ignored, as the RFC says."""
    wait, strict = None, False
    for part in re.split(r"[,;]", header or ""):
        name, _, value = part.strip().partition("=")
        value = value.strip().strip('"')
        if name.strip().lower() == "wait" and re.fullmatch(r"\d{1,9}", value):
            wait = float(min(int(value), MAX_WAIT_SECONDS))
        elif name.strip().lower() == "handling" and value.lower() == "strict":
            strict = True
    return Preferences(wait, strict)
