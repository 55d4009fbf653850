"""What is pure about webhooks: signatures, bodies, filters, what an answer asks for; and addresses for the guard."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from email.utils import format_datetime
from ipaddress import ip_address

import msgspec
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from managers.delivery.store import Secret
from managers.delivery.webhook_signing import headers, new_secret, signature
from managers.delivery.webhooks import MAX_BODY, SCHEDULE, body_of, matches, retry_after, signers
from managers.guard import MAX_URL, Forbidden, forbidden, split


def test_signatures_are_those_of_the_standard() -> None:
    # The example of the specification.
    secret = "whsec_plJ3nmyCDGBKInavdOK15jsl"
    body = b'{"event_type":"ping","data":{"success":true}}'
    told = signature(secret, "msg_loFOjxBNrRLzqYUf", 1731705121, body)
    assert told == "v1,rAvfW3dJ/X/qxhsaXPOyyCGmRKsaKWcsNccKXlIktD0="


def test_both_secrets_sign_for_a_while() -> None:
    old, new, other = new_secret(), new_secret(), new_secret()
    assert len({old, new, other}) == 3
    now = int(datetime.now(UTC).timestamp())
    both = signers(Secret(secret=new, old_secret=old, old_until=(now + 60) * 1000), now * 1000)
    assert both == [new, old]
    assert signers(Secret(secret=new, old_secret=old, old_until=now * 1000), now * 1000) == [new]
    told = headers(both, "id", now, b"{}")
    for secret in both:
        assert Webhook(secret).verify(b"{}", told) == {}
    with pytest.raises(WebhookVerificationError):
        Webhook(other).verify(b"{}", told)
    with pytest.raises(WebhookVerificationError):
        Webhook(new).verify(b"[]", told)


def test_the_schedule_is_that_of_the_issue() -> None:
    assert [round(seconds) for seconds in SCHEDULE] == [
        5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600,
    ]  # fmt: skip


def test_a_body_is_type_timestamp_and_data() -> None:
    event = {"type": "workflow:queued", "timestamp": 1795349867341, "workflowId": "w", "seq": 7, "queuePosition": 0}
    assert json.loads(body_of("workflow:queued", json.dumps(event).encode())) == {
        "type": "workflow:queued",
        "timestamp": "2026-11-22T12:17:47.341Z",
        "data": {"workflowId": "w", "seq": 7, "queuePosition": 0},
    }


@pytest.mark.parametrize("sizes", [(30_000, 10), (15_000, 9_000), (19_900, 19_900), (19_000, 100), (400_000, 30_000)])
def test_what_is_too_large_is_left_out_and_said_so(sizes: tuple[int, int]) -> None:
    event = {
        "type": "t",
        "timestamp": 0,
        "workflowId": "w",
        "seq": 7,
        "error": "é" * (sizes[0] // 2),
        "duration": 1.5,
    }
    event["outputs"] = [{"text": "x" * sizes[1]}]
    body = body_of("t", msgspec.json.encode(event))
    data = json.loads(body)["data"]
    assert len(body) < MAX_BODY
    assert (data["workflowId"], data["seq"], data["duration"]) == ("w", 7, 1.5)
    truncated = data.get("truncated", [])
    assert {name for name in ("error", "outputs") if name not in data} == set(truncated)
    assert bool(truncated) == (sum(sizes) > 19_800)
    if sizes[0] > sizes[1] and truncated:
        assert truncated[0] == "error", "the largest goes first"


def test_filters() -> None:
    assert matches(["workflow:*"], "workflow:completed")
    assert matches(["backend:stalled", "workflow:error"], "workflow:error")
    assert matches(["*"], "anything")
    assert not matches(["workflow:*"], "backend:connected")
    assert not matches(["workflow:complete"], "workflow:completed")
    assert not matches([], "workflow:completed")


def test_retry_after() -> None:
    now = 1795349867341
    in_a_minute = format_datetime(datetime.fromtimestamp(now / 1000 + 60, UTC), usegmt=True)
    assert retry_after("120", now) == 120
    assert retry_after(" 7 ", now) == 7
    assert retry_after(in_a_minute, now) == pytest.approx(60, abs=1)
    assert retry_after("Thu, 01 Jan 2015 00:00:00 GMT", now) == 0
    assert retry_after("999999999999", now) == 86400
    for nothing in (None, "", "soon", "-5", "1.5", "١٢"):
        assert retry_after(nothing, now) is None


PUBLIC = ("8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::808:808", "2002:808:808::1")
LAB = (
    *(
        "127.0.0.1",
        "127.8.9.10",
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "100.64.0.1",
        "198.18.0.1",
    ),
    *("::1", "fd12:3456::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.1.2.3", "64:ff9b::7f00:1", "64:ff9b::a00:1"),
    *("2002:7f00:1::", "2002:c0a8:101::1", "::127.0.0.1", "::10.0.0.1"),
)
NEVER = (
    *("0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.1.1", "224.0.0.1", "239.255.255.250", "255.255.255.255"),
    *("240.0.0.1", "192.0.0.192", "192.0.2.1", "198.51.100.7", "203.0.113.9", "100.100.100.200", "168.63.129.16"),
    *("::", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1", "2001::1", "fd00:ec2::254"),
    *("::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::", "::ffff:0.0.0.0", "::2", "100::1"),
    *("64:ff9b:1::7f00:1", "4000::1", "3fff::1", "5f00::1", "::ffff:224.0.0.1", "fd20:ce::254"),
)


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_may_be_called(text: str) -> None:
    assert forbidden(ip_address(text)) is None


@pytest.mark.parametrize("text", LAB)
def test_private_ones_only_in_a_lab(text: str) -> None:
    assert forbidden(ip_address(text)) == "private"
    assert forbidden(ip_address(text), allow_private=True) is None


@pytest.mark.parametrize("text", NEVER)
def test_metadata_link_local_multicast_and_reserved_never(text: str) -> None:
    assert forbidden(ip_address(text)) == "reserved"
    assert forbidden(ip_address(text), allow_private=True) == "reserved"


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("https://shop.example/hooks?key=1", "shop.example", 443),
        ("http://Shop.Example:8080", "shop.example", 8080),
        ("https://[2606:4700::1]/x", "2606:4700::1", 443),
    ],
)
def test_urls(url: str, host: str, port: int) -> None:
    assert split(url) == (host, port)


@pytest.mark.parametrize(
    "url",
    [
        *("", "shop.example", "ftp://shop.example", "file:///etc/passwd", "gopher://x", "https://", "http:///x"),
        *("https://user:secret@shop.example", "https://user@shop.example", "https://@shop.example"),
        *("https://shop.example:0", "https://shop.example:99999", "https://shop.example:x", "https://[::1"),
        *(
            "https://shop.example/#x",
            "https://shop.example\\@127.0.0.1/",
            "https://shop.example/a b",
            "https://é.example",
        ),
        *(
            "https://shop.example/\n",
            "https://shop.example/" + "x" * MAX_URL,
            "javascript:alert(1)",
            "//shop.example",
        ),
    ],
)
def test_what_is_no_url_for_us(url: str) -> None:
    with pytest.raises(Forbidden) as caught:
        split(url)
    assert "secret" not in str(caught.value)
