"""Text of the environment into values. Each takes text and raises `ValueError` whose words say what is allowed.

Must never put the text itself into an error: it may be a secret.
"""

from __future__ import annotations

import ipaddress
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import limits
from msgspec import Struct

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
LogLevel = Literal["debug", "info", "warning", "error", "critical"]
LogFormat = Literal["auto", "console", "json"]
Naming = Literal["camel", "snake"]


class BackendSettings(Struct, frozen=True):
    """One ComfyUI: its name in requests and metrics, and its address without a trailing slash."""

    name: str
    url: str


class Command(Struct, frozen=True):
    """A program and its arguments; no shell reads them."""

    argv: tuple[str, ...] = ()

    def __str__(self) -> str:
        return shlex.join(self.argv)


class BackendCards(Struct, frozen=True):
    """A backend on cards of this machine, and which; empty: that shows."""

    name: str
    cards: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}={'+'.join(self.cards)}" if self.cards else self.name


def key(text: str) -> str:
    """What can travel in a header and come out the same."""
    if text != text.strip() or not text.isprintable():
        raise ValueError("text without control characters, and without spaces at its ends")
    return text


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser for whole numbers."""
    allowed = f"a whole number from {low} to {high}" if high is not None else f"a whole number, {low} or more"

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) < low or (high is not None and int(text) > high):
            raise ValueError(allowed)
        return int(text)

    return parse


def seconds(*, above_zero: bool = False) -> Callable[[str], float]:
    """A parser for durations."""
    allowed = "a number of seconds above 0" if above_zero else "a number of seconds, 0 or more"

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 10**9 or (above_zero and not number):
            raise ValueError(allowed)
        return number

    return parse


def boolean(text: str) -> bool:
    """The words people use for yes and no."""
    if text.lower() in {"true", "1", "yes", "on"}:
        return True
    if text.lower() in {"false", "0", "no", "off"}:
        return False
    raise ValueError("true or false")


def size(text: str) -> int:
    """Bytes."""
    match = re.fullmatch(r"([0-9]{1,15})(|KiB|MiB|GiB)", text)
    if not match or not int(match[1]):
        raise ValueError("a number of bytes above 0, or one with KiB, MiB or GiB, like 10MiB")
    return int(match[1]) * {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[match[2]]


def rate(text: str) -> str | None:
    """A rate as `limits` writes it; None for off."""
    if text.lower() == "off":
        return None
    try:
        amount = limits.parse(text).amount
    except ValueError:
        amount = 0
    if amount < 1:
        raise ValueError("a number for each time, like 100/minute or 10/second, or off")
    return text


def networks(text: str) -> tuple[Network, ...]:
    """Addresses are networks of one."""
    try:
        return tuple(ipaddress.ip_network(part, strict=False) for part in _parts(text))
    except ValueError:
        raise ValueError("addresses or networks with commas between, like 10.0.0.0/8,192.168.1.7") from None


def origins(text: str) -> tuple[str, ...]:
    """Web origins as browsers send them."""
    for origin in _parts(text):
        if origin != "*" and not re.fullmatch(r"https?://[^/?#\s@]+", origin):
            raise ValueError("origins with commas between, like https://example.com, without a path; or *")
    return tuple(_parts(text))


def url(text: str) -> str:
    """An address of ComfyUI, without a slash at its end."""
    allowed = "an http:// or https:// address without query, like http://127.0.0.1:8188"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError(allowed) from None
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        raise ValueError(allowed)
    if parts.query or parts.fragment or re.search(r"[\s\\]", text):
        raise ValueError(allowed)
    return text.rstrip("/")


def address(what: str) -> Callable[[str], str]:
    """A parser for addresses of other services, without a slash at their end."""

    def parse(text: str) -> str:
        allowed = f"{what}, an http:// or https:// address without query, like https://s3.example.com"
        try:
            return url(text)
        except ValueError:
            raise ValueError(allowed) from None

    return parse


def domain(text: str) -> str:
    """A host name, as a CDN gives one."""
    if not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", text, re.ASCII):
        raise ValueError("a host name, like d111111abcdef8.cloudfront.net, without https:// and path")
    return text.lower()


def bucket(text: str) -> str:
    """A name that S3 allows, with the capitals and underscores of older ones."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]", text, re.ASCII):
        raise ValueError("the name of a bucket: 3 to 255 of a-z 0-9 . _ -")
    return text


def prefix(text: str) -> str:
    """Where keys begin, without slashes at either end."""
    parts = [part for part in text.split("/") if part]
    if any(not re.fullmatch(r"[A-Za-z0-9._=-]+", part, re.ASCII) or set(part) == {"."} for part in parts):
        raise ValueError("names with / between, like generated/comfyui, of a-z A-Z 0-9 . _ = -")
    return "/".join(parts)


def backends(text: str) -> tuple[BackendSettings, ...]:
    """`name=address` pairs."""
    allowed = (
        "name=address pairs with commas between, like local=http://127.0.0.1:8188; names of a-z 0-9 _ -, each once"
    )
    found = []
    for part in _parts(text):
        name, separator, address = (piece.strip() for piece in part.partition("="))
        if not separator or not re.fullmatch(r"[a-z0-9_-]{1,64}", name):
            raise ValueError(allowed)
        try:
            found.append(BackendSettings(name, url(address)))
        except ValueError:
            raise ValueError(allowed) from None
    if not found or len({backend.name for backend in found}) != len(found):
        raise ValueError(allowed)
    return tuple(found)


def cards(text: str) -> tuple[BackendCards, ...]:
    """Backends, each with the ids of its cards where they are given."""
    found = []
    for part in _parts(text):
        if not re.fullmatch(r"[a-z0-9_-]{1,64}(=\d+(\.\d+)?(\+\d+(\.\d+)?)*)?", part, re.ASCII):
            raise ValueError("backends with commas between, each with its cards or without, like local=0+1,second=2")
        name, _, ids = part.partition("=")
        found.append(BackendCards(name, tuple(ids.split("+")) if ids else ()))
    return tuple(found)


def folder(text: str) -> Path:
    """An absolute path; `~` is the home of who runs the service."""
    if "\0" in text:
        raise ValueError("a folder")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError("a folder; ~ needs a known home") from None


def file(text: str) -> Path:
    """An absolute path; `~` is the home of who runs the service."""
    try:
        return folder(text)
    except ValueError:
        raise ValueError("a file, like /etc/comfyui-management-api/keys.toml") from None


def command(text: str) -> Command:
    """A command line, taken apart as a shell does, without its expansions."""
    try:
        return Command(tuple(shlex.split(text)))
    except ValueError:
        raise ValueError("a command, like systemctl restart comfyui, with its quotes closed; or manager") from None


def arguments(text: str) -> Command:
    """Arguments of a program, taken apart as a shell does, without its expansions."""
    try:
        return command(text)
    except ValueError:
        raise ValueError("arguments, like --lowvram --preview-method auto, with their quotes closed") from None


def names(text: str) -> tuple[str, ...]:
    """Names of variables, or patterns of them."""
    for name in _parts(text):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_*]*", name):
            raise ValueError("names of variables with commas between, like HF_TOKEN,MY_*")
    return tuple(_parts(text))


def template(text: str) -> str:
    """The name of a template, perhaps with an alias or a version."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}(@[a-z0-9-]{1,32})?", text):
        raise ValueError("the name of a template, like txt2img or portrait@prod")
    return text


def host(text: str) -> str:
    """A name or an address, an IPv6 one with or without brackets."""
    if not re.fullmatch(r"[A-Za-z0-9._:%-]+|\[[0-9A-Fa-f:.]+\]", text):
        raise ValueError("a host name or an address, without http:// and port")
    return text.strip("[]")


_LEVELS: dict[str, LogLevel] = {
    "trace": "debug",
    "debug": "debug",
    "info": "info",
    "warn": "warning",
    "warning": "warning",
    "error": "error",
    "fatal": "critical",
    "critical": "critical",
}
_FORMATS: dict[str, LogFormat] = {"auto": "auto", "console": "console", "json": "json"}


def naming(text: str) -> Naming:
    """How names of several words are written."""
    namings: dict[str, Naming] = {"camel": "camel", "snake": "snake"}
    if text not in namings:
        raise ValueError("camel or snake")
    return namings[text]


def log_level(text: str) -> LogLevel:
    """Also the names the service before this one knew (warn, fatal, trace)."""
    if text.lower() not in _LEVELS:
        raise ValueError("debug, info, warning, error or critical")
    return _LEVELS[text.lower()]


def log_format(text: str) -> LogFormat:
    """How lines look."""
    if text.lower() not in _FORMATS:
        raise ValueError("console, json or auto")
    return _FORMATS[text.lower()]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
