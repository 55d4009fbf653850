"""The guard on real sockets: names that change their mind, certificates, redirects."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from managers.clock import SystemClock
from managers.delivery.port import Again, Delivered, Outcome
from managers.delivery.webhook_signing import new_secret
from managers.delivery.webhooks import Sender
from managers.guard import Forbidden, Guard, Unresolved, resolve_by_system
from tests.delivery.receiver import Answer, Receiver, receiving

SECRET = new_secret()


class Names:
    """A name server that gives one answer after the other, the last one again and again."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


async def call(guard: Guard, url: str, context: ssl.SSLContext | None = None) -> Outcome:
    sender = Sender(guard, clock=SystemClock(), agent="test/1", context=context or ssl.create_default_context())
    try:
        return await sender.send(url, [SECRET], "id-1", b"{}")
    finally:
        await sender.aclose()


async def test_names_that_mean_this_machine_are_refused(receiver: Receiver) -> None:
    for host in ("localhost", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "0x7f.1", "127.1"):
        url = f"http://{host}:{receiver.port}/"
        try:
            await Guard().check(url)
            refused = await Guard().addresses(host, 80) == ()  # what the system does not take for an address
        except (Forbidden, Unresolved):
            refused = True
        assert refused, host
        outcome = await call(Guard(), url)
        assert isinstance(outcome, Again), host
        assert "127" not in outcome.reason
    assert not receiver.calls


async def test_one_bad_address_among_good_ones_is_enough(receiver: Receiver) -> None:
    guard = Guard(resolve=Names(["93.184.216.34", "127.0.0.1"]))
    with pytest.raises(Forbidden, match="private"):
        await guard.check("http://shop.example/")
    assert await call(guard, f"http://shop.example:{receiver.port}/") == Again(
        "The address of this host is private, and nothing may be sent there"
    )


async def test_a_name_that_changes_its_mind_gets_nothing(receiver: Receiver) -> None:
    names = Names(["93.184.216.34"], ["127.0.0.1"])
    guard = Guard(resolve=names)
    url = f"http://rebind.example:{receiver.port}/"
    await guard.check(url)
    outcome = await call(guard, url)
    assert isinstance(outcome, Again)
    assert "private" in outcome.reason
    assert names.asked == ["rebind.example"] * 2
    assert not receiver.calls


async def test_the_address_that_was_checked_is_the_one_that_is_called(receiver: Receiver) -> None:
    # Whoever asked a second time would get an address where nobody listens.
    names = Names(["127.0.0.1"], ["127.0.0.99"])
    url = f"http://shop.example:{receiver.port}/hook?a=b"
    assert await call(Guard(allow_private=True, resolve=names), url) == Delivered(204)
    assert names.asked == ["shop.example"]
    (heard,) = receiver.calls
    assert heard.headers["host"] == f"shop.example:{receiver.port}"
    assert heard.path == "/hook?a=b"


async def test_the_next_address_is_tried_when_nobody_listens_at_the_first(receiver: Receiver) -> None:
    names = Names(["127.0.0.99", "127.0.0.1"])
    assert await call(Guard(allow_private=True, resolve=names), f"http://shop.example:{receiver.port}/") == Delivered(
        204
    )


async def test_each_call_asks_anew_and_keeps_no_connection(receiver: Receiver) -> None:
    names = Names(["127.0.0.1"], ["127.0.0.1"], ["169.254.169.254"])
    guard = Guard(allow_private=True, resolve=names)
    sender = Sender(guard, clock=SystemClock(), agent="test/1", context=ssl.create_default_context())
    url = f"http://shop.example:{receiver.port}/"
    outcomes = [await sender.send(url, [SECRET], "id", b"{}") for _ in range(3)]
    await sender.aclose()
    assert outcomes[:2] == [Delivered(204)] * 2
    assert isinstance(outcomes[2], Again)
    assert len(receiver.calls) == 2


async def test_redirects_are_not_followed(receiver: Receiver) -> None:
    with receiving() as inside:
        receiver.answer = lambda _: Answer(307, {"location": inside.url})
        outcome = await call(Guard(allow_private=True), receiver.url)
        assert outcome == Again("It answered 307, and redirects are not followed", status=307)
        assert not inside.calls


async def test_proxies_of_the_environment_are_not_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert await call(Guard(allow_private=True), receiver.url) == Delivered(204)
        assert not proxy.calls


async def test_a_name_that_nobody_knows() -> None:
    guard = Guard()
    await guard.check("https://no-such-host.invalid/")  # it may be there tomorrow
    assert await call(guard, "https://no-such-host.invalid/") == Again("The host cannot be resolved")
    with pytest.raises(Unresolved):
        await resolve_by_system("x" * 70 + ".invalid", 80)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of shop.example, signed by itself."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=shop.example", "-addext", "subjectAltName=DNS:shop.example"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
        timeout=20,
    )
    return cert, key


async def test_tls_names_the_host_and_not_the_address(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    names: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: names.append(name)
    receiver = Receiver()
    receiver.start(server)
    try:
        trusting = ssl.create_default_context(cafile=str(cert))
        guard = Guard(allow_private=True, resolve=Names(["127.0.0.1"]))
        url = f"https://shop.example:{receiver.port}/"
        assert await call(guard, url, trusting) == Delivered(204)
        assert names == ["shop.example"]
        assert receiver.calls[0].headers["host"] == f"shop.example:{receiver.port}"
        wrong = await call(guard, f"https://other.example:{receiver.port}/", trusting)
        assert isinstance(wrong, Again)
        assert "certificate" in wrong.reason
        unknown = await call(guard, url)
        assert isinstance(unknown, Again)
        assert "certificate" in unknown.reason
        assert len(receiver.calls) == 1
    finally:
        receiver.stop()


async def test_the_transport_serves_other_clients_too(receiver: Receiver) -> None:
    """Inputs are fetched through the same guard."""
    guard = Guard(resolve=Names(["127.0.0.1"]))
    transport = guard.transport(ssl.create_default_context())
    async with httpx.AsyncClient(transport=transport, trust_env=False, follow_redirects=False) as client:
        with pytest.raises(Forbidden):
            await client.get(f"http://pictures.example:{receiver.port}/a.png")
