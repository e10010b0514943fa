"""Clients that offer another protocol than HTTP/1.1 on each connection, as Java's HTTP client does."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest

from tests.launch.stack import Stack, running

CHAT = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hello"}]}).encode()
OFFER = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
LENGTH = f"Content-Length: {len(CHAT)}\r\n"
HALF = len(CHAT) // 2
CHUNKED = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (HALF, CHAT[:HALF], len(CHAT) - HALF, CHAT[HALF:])


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running(("chat",)) as stack:
        yield stack


@pytest.fixture
def client(stack: Stack) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", stack.port), timeout=30) as client:
        yield client


def post(*headers: str, version: str = "1.1") -> bytes:
    return f"POST /v1/chat/completions HTTP/{version}\r\nHost: x\r\n{''.join(headers)}\r\n".encode()


def answer(client: socket.socket) -> tuple[int, bytes]:
    response = HTTPResponse(client)
    response.begin()
    return response.status, response.read()


def is_chat(client: socket.socket) -> bool:
    status, body = answer(client)
    return status == 200 and json.loads(body)["choices"][0]["message"]["content"] == "chat heard hello"


@pytest.mark.parametrize(
    "request_bytes",
    [post(OFFER, LENGTH) + CHAT, post(OFFER, "Transfer-Encoding: chunked\r\n") + CHUNKED],
    ids=["of known length", "chunked"],
)
def test_request_with_an_offer_is_served_and_the_next_ones_too(
    client: socket.socket, request_bytes: bytes
) -> None:
    for request in (request_bytes, request_bytes, post(LENGTH) + CHAT, request_bytes):
        client.sendall(request)
        assert is_chat(client)


def test_body_that_comes_later_is_read(client: socket.socket) -> None:
    for _ in range(2):
        client.sendall(post(OFFER, LENGTH, "Expect: 100-continue\r\n"))
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n", "now it waits for the body"
        client.sendall(CHAT)
        assert is_chat(client)
    client.sendall(post(LENGTH) + CHAT)
    assert is_chat(client)


def test_head_in_pieces_and_requests_in_one_packet_are_told_apart(client: socket.socket) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in post(OFFER, LENGTH) + CHAT:
        client.sendall(bytes([byte]))
    assert is_chat(client)
    models = f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{OFFER}\r\n".encode()
    client.sendall(models + post(OFFER, LENGTH) + CHAT + models.replace(b"/v1/models", b"/nope"))
    seen = b""
    while len(statuses := re.findall(rb"HTTP/1.1 (\d+)", seen)) < 3:
        part = client.recv(65536)
        assert part, "closed"
        seen += part
    assert statuses == [b"200", b"200", b"404"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        post(OFFER, LENGTH, version="1.0") + CHAT,
        post(OFFER.replace("Upgrade,", "close, Upgrade,"), LENGTH) + CHAT,
    ],
    ids=["HTTP/1.0", "close"],
)
def test_connection_that_shall_end_is_answered_and_closed(
    client: socket.socket, request_bytes: bytes
) -> None:
    client.sendall(request_bytes)
    assert is_chat(client)
    assert client.recv(1) == b""


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 403),
        (b"CONNECT a.example:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (post(OFFER, LENGTH, "Transfer-Encoding: chunked\r\n") + CHUNKED, 400),
    ],
    ids=["websocket", "tunnel", "two lengths"],
)
def test_what_is_not_served_is_an_error(client: socket.socket, request_bytes: bytes, status: int) -> None:
    client.sendall(request_bytes)
    assert answer(client)[0] == status
