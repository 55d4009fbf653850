"""Whatever frames a client sends on the stream, the service lives and others hear on."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.sync.client import ClientConnection

from tests.doors import AUTHORIZED, SECONDS, STREAM, Doors, opened
from tests.queue_kit import PATH, picture


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    with opened(tmp_path_factory.mktemp("doors")) as found:
        yield found


FRAMES = st.one_of(
    st.builds(Frame, st.just(Opcode.TEXT), st.binary(max_size=80), st.booleans()),
    st.builds(Frame, st.just(Opcode.TEXT), st.text(max_size=80).map(str.encode), st.just(True)),
    st.builds(
        Frame,
        st.just(Opcode.TEXT),
        st.fixed_dictionaries(
            {"type": st.sampled_from(["ping", "subscribe", "unsubscribe", "", "pong", None])},
            optional={
                "workflowId": st.recursive(
                    st.none() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=3)
                ),
                "channels": st.lists(st.sampled_from(["workflow", "preview", "gpu", "x"]), max_size=3) | st.text(),
                "since": st.integers() | st.floats() | st.text(max_size=3),
            },
        ).map(lambda value: json.dumps(value).encode()),
        st.just(True),
    ),
    st.builds(Frame, st.just(Opcode.BINARY), st.binary(max_size=80), st.booleans()),
    st.builds(Frame, st.just(Opcode.CONT), st.binary(max_size=80), st.booleans()),
    st.builds(Frame, st.sampled_from([Opcode.PING, Opcode.PONG]), st.binary(max_size=125), st.just(True)),
    st.builds(Frame, st.just(Opcode.TEXT), st.just(b"[" * 60_000), st.just(True)),
    st.builds(Frame, st.just(Opcode.TEXT), st.just(b'"' + b"x" * (1 << 20)), st.just(True)),
    st.builds(Frame, st.just(Opcode.CLOSE), st.binary(max_size=125), st.just(True)),
).map(lambda frame: frame.serialize(mask=True))
GARBAGE = st.one_of(
    st.binary(min_size=1, max_size=60),
    st.just(b"\x81\xff" + b"\x7f" + b"\xff" * 7 + b"mask"),  # a frame of 2^63 bytes
    st.just(b"\x81\x05hello"),  # without a mask
    st.just(b"\xf1\x80mask"),  # reserved bits
    st.just(b"\x09\x80mask"),  # a ping in pieces
)


def handshake(doors: Doors) -> socket.socket:
    """A socket on the stream, for bytes of our own."""
    key = base64.b64encode(os.urandom(16))
    connection = doors.open(
        f"GET {STREAM} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n".encode()
        + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n" + AUTHORIZED + b"\r\n"
    )  # fmt: skip
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    assert reply.status == 101
    return connection


@pytest.fixture(scope="module")
def listener(doors: Doors) -> Iterator[ClientConnection]:
    with doors.listen() as connection:
        yield connection


@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(frames=st.lists(FRAMES, max_size=25), garbage=st.none() | GARBAGE)
def test_whatever_frames_are_sent(
    doors: Doors, listener: ClientConnection, frames: list[bytes], garbage: bytes | None
) -> None:
    with handshake(doors) as connection:
        try:
            for frame in frames:
                connection.sendall(frame)
            connection.sendall(garbage or Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):  # it is ended by the service, in every case
                pass
        except OSError:  # it was ended before that
            pass
    listener.send('{"type":"ping"}')
    assert json.loads(listener.recv(SECONDS))["type"] == "pong"


def rest(stream: ClientConnection) -> Iterator[str]:
    """The types of the frames that come before the end."""
    while True:
        try:
            yield json.loads(stream.recv(SECONDS))["type"]
        except ConnectionClosed:
            return


def test_who_sends_only_rubbish_is_closed_and_others_hear_on(doors: Doors, listener: ClientConnection) -> None:
    for rubbish in ("{", b"\0" * 1000, "x" * 70_000, '{"type":"subscribe","workflowId":"1"}'):
        with doors.listen() as stream:
            for _ in range(20):
                stream.send(rubbish)
            heard = list(rest(stream))
            assert heard == ["error"] * len(heard)
            assert 0 < len(heard) <= 20
            assert stream.protocol.close_code == 1008
    with doors.listen() as stream:
        with suppress(ConnectionClosed):  # at its first bytes, which say how long it is
            stream.send("x" * (1 << 21))
        assert list(rest(stream)) == []
        assert stream.protocol.close_code in {1006, 1009}  # 1006 where the client still sent
    reply = doors.client.post(PATH, json={"workflow": picture()})
    assert json.loads(listener.recv(SECONDS))["workflowId"] == reply.json()["workflowId"]
