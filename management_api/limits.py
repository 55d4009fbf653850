"""How many requests one client address may send (CONTRACT 1): a fixed window, counted by `limits` in memory.

Must never know about keys or routes. Synchronous on purpose: nothing can come between the count and the answer.
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
    """What is left of the window: requests, and whole seconds until it begins anew."""

    allowed: bool
    limit: int
    remaining: int
    reset_seconds: int


class RateLimiter:
    """Counts hits for each address; IPv6 clients own a /64, so that is what is counted."""

    def __init__(self, rate: str, allow: Sequence[Network] = ()) -> None:
        self._item = limits.parse(rate)
        self._expiry = self._item.get_expiry()
        self._allow = tuple(allow)
        self._storage = MemoryStorage()
        self._bucket = lru_cache(4096)(self._find_bucket)
        self.rate = str(self._item)

    def hit(self, address: str) -> Verdict | None:
        """Count one request; None for an address that is not limited."""
        bucket = self._bucket(address)
        if bucket is None:
            return None
        count = self._storage.incr(bucket, self._expiry)
        return self._verdict(bucket, count)

    def failed(self, address: str) -> None:
        """Count one wrong key sent to a path that is itself not limited."""
        bucket = self._bucket(address)
        if bucket is not None:
            self._storage.incr(bucket, self._expiry)
            self._storage.incr(f"failed:{bucket}", self._expiry)

    def too_many_failures(self, address: str) -> Verdict | None:
        """A verdict when this address used up its window with wrong keys on paths that are themselves not limited."""
        bucket = self._bucket(address)
        if bucket is None or self._storage.get(f"failed:{bucket}") < self._item.amount:
            return None
        return self._verdict(f"failed:{bucket}", self._item.amount + 1)

    def _verdict(self, bucket: str, count: int) -> Verdict:
        amount = self._item.amount
        left = self._storage.get_expiry(bucket) - time.time()
        return Verdict(count <= amount, amount, max(0, amount - count), max(1, math.ceil(left)))

    def _find_bucket(self, text: str) -> str | None:
        address = parse_address(text)
        if address is None:
            return f"ip:{text}"
        if any(address in network for network in self._allow):
            return None
        if isinstance(address, ipaddress.IPv6Address):
            return f"ip:{ipaddress.ip_network((address, 64), strict=False)}"
        return f"ip:{address}"


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
