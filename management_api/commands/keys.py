"""`management-api keys`: make, list and revoke the named keys of a file. A running service follows by itself.

Must never print a key but once, when it is made, and that alone on stdout.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from management_api.commands.terminal import clean, complain, say, tell
from management_api.keys import Key, KeysError, add_key, read_keys, revoke_key
from management_api.settings import SettingsError, load
from managers.callers import KeyScope

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_ALONE = {
    KeyScope.SUBMIT: "It cannot look at workflows, not even its own: that needs the scope read as well.",
    KeyScope.READ: "It sees everything, and changes nothing.",
    KeyScope.ADMIN: "It may do everything, like MANAGEMENT_API_KEY.",
}


def run(given: argparse.Namespace) -> int:
    """Do what is asked. Gives the exit status."""
    try:
        path = _file(given.file)
        if path is None:
            return complain("Where are the keys kept? Set MANAGEMENT_API_KEYS_FILE, or give --file")
        match given.action:
            case "add":
                _add(path, given)
            case "revoke":
                revoke_key(path, given.name)
                tell(clean(f"The key {given.name} is revoked: a running service refuses it within a second."))
            case _:
                _list(path)
    except (KeysError, SettingsError) as error:
        return complain(str(error))
    return 0


def duration(text: str) -> timedelta:
    """`90d`, `12h`, `30m`. Raises `ArgumentTypeError`."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})([mhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError("give a number of minutes, hours or days, like 30m, 12h or 90d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def scopes(text: str) -> Sequence[KeyScope]:
    """`read`, or several with commas. Raises `ArgumentTypeError`."""
    try:
        return [KeyScope(part.strip()) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"give one or more of {', '.join(KeyScope)}") from None


def _file(given: Path | None) -> Path | None:
    if given is not None:
        return given.expanduser().absolute()
    return load(os.environ, Path(".env"), require_key=False).api.keys_file


def _add(path: Path, given: argparse.Namespace) -> None:
    expires_at = None
    if given.expires is not None:
        expires_at = (datetime.now(UTC) + given.expires).replace(microsecond=0)
    key = add_key(
        path,
        given.name,
        scopes=given.scope,
        rate_limit=given.rate_limit,
        max_queued=given.max_queued,
        expires_at=expires_at,
    )
    say(key)
    tell(clean(f"This is the only time that the key {given.name} is shown: {path} holds its hash."))
    if len(set(given.scope)) == 1:
        tell(_ALONE[given.scope[0]])
    if given.file is not None:
        tell(clean(f"A service reads it with MANAGEMENT_API_KEYS_FILE={path}"))


def _list(path: Path) -> None:
    keys, _ = read_keys(path)
    if not keys:
        tell(clean(f"There are no keys in {path}"))
        return
    table: list[tuple[str, ...]] = [("NAME", "SCOPES", "RATE LIMIT", "MAX QUEUED", "CREATED", "EXPIRES")]
    table += [_row(name, key) for name, key in keys.items()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        say(clean("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()))


def _row(name: str, key: Key) -> tuple[str, ...]:
    expires = "never"
    if key.expires_at is not None:
        expires = _day(key.expires_at) + (" (expired)" if key.expires_at <= datetime.now(UTC) else "")
    queued = "-" if key.max_queued is None else str(key.max_queued)
    return name, ",".join(key.scopes), key.rate_limit or "-", queued, _day(key.created_at), expires


def _day(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M}Z"
