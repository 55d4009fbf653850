"""How many requests one client may send (CONTRACT 1): a fixed window, counted by `limits` in memory.

A client is an address, or a key that has a limit of its own. Must never see a key, only its name, and know no routes.
Synchronous on purpose: nothing can come between the count and the answer.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Sequence
from functools import lru_cache

import limits
from limits.storage import MemoryStorage
from msgspec import Struct

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Verdict(Struct, frozen=True):
    """What is left of the window: requests, and whole seconds until it begins anew. `rate` is for people."""

    allowed: bool
    rate: str
    limit: int
    remaining: int
    reset_seconds: int


class RateLimiter:
    """Counts hits for each address (IPv6 clients own a /64, so that is what is counted), or for each key by its name.

    `rate` is that of an address; None: addresses are not limited.
    """

    def __init__(self, rate: str | None, allow: Sequence[Network] = ()) -> None:
        self._item = None if rate is None else _parsed(rate)
        self._allow = tuple(allow)
        self._storage = MemoryStorage()
        self._bucket = lru_cache(4096)(self._find_bucket)

    def hit(self, address: str) -> Verdict | None:
        """Count one request; None for an address that is not limited."""
        bucket = self._bucket(address)
        if bucket is None or self._item is None:
            return None
        return self._count(bucket, self._item)

    def hit_key(self, name: str, rate: str) -> Verdict | None:
        """Count one request of this key, wherever it comes from; None when its rate is `off`."""
        item = _parsed(rate)
        return None if item is None else self._count(f"key:{name}:{item}", item)

    def failed(self, address: str) -> None:
        """Count one wrong key sent to a path that is itself not limited."""
        bucket = self._bucket(address)
        if bucket is not None and self._item is not None:
            self._storage.incr(bucket, self._item.get_expiry())
            self._storage.incr(f"failed:{bucket}", self._item.get_expiry())

    def too_many_failures(self, address: str) -> Verdict | None:
        """A verdict when this address used up its window with wrong keys on paths that are themselves not limited."""
        bucket = self._bucket(address)
        if bucket is None or self._item is None or self._storage.get(f"failed:{bucket}") < self._item.amount:
            return None
        return self._verdict(f"failed:{bucket}", self._item, self._item.amount + 1)

    def _count(self, bucket: str, item: limits.RateLimitItem) -> Verdict:
        return self._verdict(bucket, item, self._storage.incr(bucket, item.get_expiry()))

    def _verdict(self, bucket: str, item: limits.RateLimitItem, count: int) -> Verdict:
        amount = item.amount
        left = self._storage.get_expiry(bucket) - time.time()
        return Verdict(count <= amount, str(item), amount, max(0, amount - count), max(1, math.ceil(left)))

    def _find_bucket(self, text: str) -> str | None:
        return client_of(text, self._allow)


class ClientAddress:
    """Who is asking: the peer, or what a trusted proxy says about it."""

    def __init__(self, trusted_proxies: Sequence[Network] = ()) -> None:
        self._trusted = tuple(trusted_proxies)
        self._is_trusted = lru_cache(4096)(self._look)

    def of(self, peer: str, headers: Sequence[tuple[bytes, bytes]]) -> str:
        """The right-most address of X-Forwarded-For that no trusted proxy put there; the peer when it is not one."""
        if not self._trusted or not self._is_trusted(peer):
            return peer
        hops = b",".join(value for name, value in headers if name == b"x-forwarded-for").decode("latin-1")
        found = peer
        for hop in reversed(hops.split(",")):
            address = parse_address(hop.strip())
            if address is None:
                break
            found = str(address)
            if not self._is_trusted(found):
                break
        return found

    def _look(self, text: str) -> bool:
        address = parse_address(text)
        return address is not None and any(address in network for network in self._trusted)


def client_of(text: str, allow: Sequence[Network]) -> str | None:
    """What is counted for this address; None: it is in one of the networks that are not limited."""
    address = parse_address(text)
    if address is None:
        return f"ip:{text}"
    if any(address in network for network in allow):
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return f"ip:{ipaddress.ip_network((address, 64), strict=False)}"
    return f"ip:{address}"


@lru_cache(4096)
def _parsed(rate: str) -> limits.RateLimitItem | None:
    return None if rate.lower() == "off" else limits.parse(rate)


def parse_address(text: str) -> Address | None:
    """An address, also in the forms `1.2.3.4:80` and `[::1]:80`; an IPv4 in an IPv6 coat is told as IPv4."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address
