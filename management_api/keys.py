"""Named keys in a file (`MANAGEMENT_API_KEYS_FILE`): made, listed and revoked by `management-api keys`, followed by
the service while it runs.

The file holds a plain SHA-256 of each key. That is right here, and only here: a key is 256 random bits of our own
making, so there is nothing to guess that a slow hash would have to protect; what does not look like such a key is not
even looked up. Finding a key by its digest tells nobody anything by the time it takes.

Must never write, log or tell a key: it is returned once, by `add_key`.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import msgspec
import structlog
from msgspec import Meta, Struct

from management_api import values
from managers.callers import ADMIN, Caller, KeyScope
from managers.clock import Clock

PREFIX = "cma_"
_RANDOM_BYTES = 32
_LENGTH = len(PREFIX) + 43
_LOOK_SECONDS = 1.0
_MAX_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_A_KEY = re.compile(rf"{PREFIX}[A-Za-z0-9_-]+")
_HEADER = """\
# Keys of the ComfyUI Management API. These are hashes: nobody gets in with what stands here.
# Written by `management-api keys add` and `revoke` (comments of yours are lost then). A running service follows.
"""
_log = structlog.get_logger(__name__)

Time = Annotated[datetime, Meta(tz=True)]


class KeysError(ValueError):
    """The keys file cannot be used as it is, or as it was asked for; one line for the operator, without secrets."""


class Key(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """One table of the file."""

    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[KeyScope, ...], Meta(min_length=1)]
    created_at: Time
    rate_limit: str | None = None
    max_queued: Annotated[int, Meta(ge=1)] | None = None
    expires_at: Time | None = None


Keys = dict[str, Key]
Stamp = tuple[int, int, int, int]


# ---- the file


def read_keys(path: Path) -> tuple[Keys, Stamp]:
    """The keys by name, and what the file looked like when it was read. Raises `KeysError`."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(file, "rb") as opened:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise KeysError(f"{path} is no file")
            text = opened.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise KeysError(f"{path} is not there; `management-api keys add` makes it") from None
    except OSError as error:
        raise KeysError(f"{path} cannot be read: {error.strerror}") from None
    if len(text) > _MAX_BYTES:
        raise KeysError(f"{path} is larger than any keys file")
    try:
        return _decoded(text), _stamp(found)
    except ValueError as error:  # msgspec's errors and UnicodeDecodeError are such
        raise KeysError(f"{path}: {_A_KEY.sub('cma_***', str(error))}") from None


def add_key(
    path: Path,
    name: str,
    *,
    scopes: Sequence[KeyScope],
    rate_limit: str | None = None,
    max_queued: int | None = None,
    expires_at: datetime | None = None,
) -> str:
    """Make a key, keep its hash in the file (made if need be), and give the key. Raises `KeysError`."""
    key = PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    entry = Key(
        sha256=sha256(key.encode()).hexdigest(),
        scopes=tuple(scope for scope in KeyScope if scope in scopes),
        created_at=datetime.now(UTC).replace(microsecond=0),
        rate_limit=rate_limit,
        max_queued=max_queued,
        expires_at=expires_at,
    )
    try:
        _check(name, entry)
    except ValueError as error:
        raise KeysError(str(error)) from None
    with _changing(path) as keys:
        if name in keys:
            raise KeysError(f"There is a key {name} in {path} already: revoke it first, or choose another name")
        keys[name] = entry
    return key


def revoke_key(path: Path, name: str) -> None:
    """Take the key out of the file. Raises `KeysError`, also when there is none of this name."""
    read_keys(path)  # a file that is not there is not made for this
    with _changing(path) as keys:
        if keys.pop(name, None) is None:
            raise KeysError(f"There is no key of this name in {path}")


def _decoded(text: bytes) -> Keys:
    tables = msgspec.toml.decode(text, type=dict[str, Any])
    keys: Keys = {}
    owners: dict[str, str] = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{name} stands outside of a [name]")
        try:
            key = msgspec.convert(table, Key)
            _check(name, key)
        except ValueError as error:
            raise ValueError(f"[{name}]: {error}") from None
        if key.sha256 in owners:
            raise ValueError(f"[{name}] is the same key as [{owners[key.sha256]}]")
        owners[key.sha256] = name
        keys[name] = key
    return keys


def _check(name: str, key: Key) -> None:
    """What a type cannot say. Raises `ValueError`."""
    if not _NAME.fullmatch(name) or name.startswith(PREFIX):
        raise ValueError("A key's name has 1 to 64 of A-Z a-z 0-9 _ -, and begins with a letter or a digit, not cma_")
    if name == ADMIN:
        raise ValueError(f"The name {ADMIN} belongs to MANAGEMENT_API_KEY")
    if key.max_queued is not None and key.max_queued < 1:
        raise ValueError("A key that may have nothing waiting could hand in nothing: give 1 or more")
    if key.rate_limit is not None:
        try:
            values.rate(key.rate_limit)
        except ValueError as error:
            raise ValueError(f"The rate limit is not understood: give {error}") from None


def _encoded(keys: Keys) -> bytes:
    """TOML. A JSON text, a list of words and a number are the same in both; a time stands without quotes."""
    lines = [_HEADER]
    for name, key in keys.items():
        lines.append(f"[{name}]")
        for field, value in zip(key.__struct_encode_fields__, msgspec.structs.astuple(key), strict=True):
            if value is not None:
                text = msgspec.json.encode(value).decode()
                lines.append(f"{field} = " + (text.strip('"') if isinstance(value, datetime) else text))
        lines.append("")
    return "\n".join(lines).encode()


@contextmanager
def _changing(path: Path) -> Iterator[Keys]:
    """The keys, to be changed; written when the block ends well. Two commands at once wait for each other."""
    path = path.resolve()  # what a link leads to is replaced, not the link
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeysError(f"{path.parent} cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = read_keys(path)[0] if path.exists() else {}
        yield keys
        _replace(path, _encoded(keys), folder)
    except OSError as error:
        raise KeysError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        os.close(folder)


def _replace(path: Path, text: bytes, folder: int) -> None:
    """Old or new, whatever happens. The file stays its owner's: who changes it may be root, who reads it is not."""
    file, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(file, "wb") as opened:
            if path.exists() and (path.stat().st_uid, path.stat().st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file, path.stat().st_uid, path.stat().st_gid)
            opened.write(text)
            opened.flush()
            os.fsync(file)
        Path(temporary).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise
    os.fsync(folder)


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


# ---- the service's view of it


class KeyRing:
    """The keys that are good now. It looks at the file when somebody comes in, at most once a second.

    Reading it takes some 60 µs for each key, and only after a change, so it is done in place. A file that cannot be
    used changes nothing: the last good keys stay, and an error is logged once.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        """Raises `KeysError`: at the start there is no last good file."""
        self._path = path
        self._clock = clock
        self._next_look = clock.monotonic() + _LOOK_SECONDS
        self._stamp: Stamp | None
        try:
            keys, self._stamp = read_keys(path)
        except KeysError as error:
            raise KeysError(f"MANAGEMENT_API_KEYS_FILE: {error}") from None
        self._take(keys)

    def find(self, offered: bytes) -> Caller | None:
        """Whose key this is; None when it is nobody's, or has expired."""
        if len(offered) != _LENGTH or not offered.startswith(PREFIX.encode()):
            return None
        return self._find(sha256(offered).digest())

    def _find(self, digest: bytes) -> Caller | None:
        if self._clock.monotonic() >= self._next_look:
            self._look()
        caller, expires_ms = self._callers.get(digest, (None, None))
        if expires_ms is not None and self._clock.now_ms() >= expires_ms:
            return None
        return caller

    def _look(self) -> None:
        self._next_look = self._clock.monotonic() + _LOOK_SECONDS
        try:
            stamp = _stamp(self._path.stat())
        except OSError:
            stamp = None
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            keys, self._stamp = read_keys(self._path)
        except KeysError as error:
            _log.error("the keys file cannot be used, the last good keys stay", reason=str(error))
            return
        self._take(keys)
        _log.info("keys read", keys=list(keys))

    def _take(self, keys: Keys) -> None:
        self._callers = {bytes.fromhex(key.sha256): self._caller(name, key) for name, key in keys.items()}

    def _caller(self, name: str, key: Key) -> tuple[Caller, int | None]:
        scopes = frozenset(key.scopes)
        caller = Caller(
            name=name,
            scopes=scopes,
            rate_limit=key.rate_limit,
            max_queued=key.max_queued,
            welcome=partial(self._still_good, bytes.fromhex(key.sha256), scopes),
        )
        return caller, None if key.expires_at is None else int(key.expires_at.timestamp() * 1000)

    def _still_good(self, digest: bytes, scopes: frozenset[KeyScope]) -> bool:
        now = self._find(digest)
        return now is not None and all(map(now.may, scopes))
