"""One HTTP request as the front sees it, and the small change of HTTP: body, keys, headers, plain answers."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from prism_sgl.config import ServerConfig
from prism_sgl.launch.errors_http import HttpError
from prism_sgl.launch.routes import Kind, Route

AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

# RFC 9110 7.6.1, and what is meant for us alone: keys never reach an engine.
_NOT_FORWARDED = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"expect",
        b"authorization",
        b"x-api-key",
        b"cookie",
        b"content-length",
    }
)
_NOT_RETURNED = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"trailer", b"x-request-id"}
)
_PUBLIC = frozenset({"/health", "/health_generate", "/ready", "/live", "/ping", "/metrics"})
_NO_OTHER_SITE = (b"none", b"same-origin")  # none: typed into the address bar
_PROXY_HEADERS = (b"x-forwarded-for", b"forwarded", b"x-real-ip")


class Call:
    """What the client sent, without the body."""

    __slots__ = ("client", "headers", "method", "model", "params", "path", "query", "raw_headers")

    def __init__(self, scope: Mapping[str, Any]) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]  # decoded; without /m/<model> once the front has seen it
        self.query: bytes = scope["query_string"]
        self.raw_headers: Headers = scope["headers"]
        self.headers: dict[bytes, bytes] = dict(self.raw_headers)
        self.client: str | None = scope["client"][0] if scope.get("client") else None
        self.model: str | None = None  # given by the base URL
        self.params: dict[str, str] = {}  # of the path

    def query_value(self, name: str) -> str | None:
        if not self.query:
            return None
        return next(iter(parse_qs(self.query.decode(errors="replace")).get(name, ())), None)

    def forwarded_headers(self, body_bytes: int) -> Headers:
        headers = [header for header in self.raw_headers if header[0] not in _NOT_FORWARDED]
        if body_bytes or self.method not in ("GET", "HEAD"):
            headers.append((b"content-length", str(body_bytes).encode()))
        return headers

    def request_id(self) -> bytes | None:
        """The client's own, if it is fit to be echoed."""
        given = self.headers.get(b"x-request-id", b"")
        return given if 0 < len(given) <= 200 and given.isascii() and given.decode().isprintable() else None


def returned_headers(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    return [header for header in headers if header[0].lower() not in _NOT_RETURNED]


async def read_body(call: Call, receive: Receive, limit_bytes: int) -> bytes:
    """Raises HttpError 413 or 415, ConnectionResetError if the client goes away meanwhile."""
    headers = call.headers
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise HttpError(415, "unsupported_encoding", "send the body without content-encoding")
    too_large = HttpError(
        413, "request_too_large", f"the body is larger than {limit_bytes} bytes (server.max_body)"
    )
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise too_large
    parts: list[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ConnectionResetError
        if part := message.get("body", b""):
            parts.append(part)
            size_bytes += len(part)
            if size_bytes > limit_bytes:
                raise too_large
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def answer(
    send: Send,
    status: int,
    body: bytes,
    *,
    content_type: bytes = b"application/json",
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    head: Headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class Gate:
    """Who may do what: API keys for clients, admin keys or loopback for operators."""

    def __init__(self, server: ServerConfig) -> None:
        self._api_keys = [key.encode() for key in server.api_keys]
        self._admin_keys = [key.encode() for key in server.admin_keys]

    def check(self, call: Call, route: Route) -> None:
        """Raises HttpError 401 or 403."""
        if route.kind is Kind.ADMIN:
            self._check_admin(call)
        elif self._api_keys and route.path not in _PUBLIC:
            given = _key(call.headers)
            # An admin key opens all doors, so that operators need only one.
            if not _is_one_of(given, [*self._api_keys, *self._admin_keys]):
                raise _unauthorized("API key", given)

    def _check_admin(self, call: Call) -> None:
        if self._admin_keys:
            given = _key(call.headers)
            if not _is_one_of(given, self._admin_keys):
                raise _unauthorized("admin key", given)
        elif not _is_loopback(call):
            raise HttpError(
                403,
                "admin_only",
                f"{call.path} is for operators: call it from the server's own host as localhost, "
                "or configure server.admin_keys",
            )


def _key(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def _is_one_of(given: bytes, keys: list[bytes]) -> bool:
    # All are compared, each in constant time: how long it takes tells nothing of how near a guess was.
    return any([hmac.compare_digest(given, key) for key in keys])


def _unauthorized(kind: str, given: bytes) -> HttpError:
    problem = "is not right" if given else "is missing"
    message = f"the {kind} {problem}; send it as the header Authorization: Bearer KEY"
    return HttpError(401, "invalid_api_key", message)


def _is_loopback(call: Call) -> bool:
    """From this host, by a program: a page in a browser or somebody behind a local proxy is not that."""
    # The image of a page is asked for without Origin, but says that another site wants it.
    if b"origin" in call.headers or call.headers.get(b"sec-fetch-site", b"none") not in _NO_OTHER_SITE:
        return False
    if call.client is None or any(name in call.headers for name in _PROXY_HEADERS):
        return False
    if not _is_named_by_itself(call.headers.get(b"host", b"")):
        return False
    address = _ip_address(call.client)
    # Listening on "::", 127.0.0.1 comes as ::ffff:127.0.0.1, which Python before 3.13 does not call loopback.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address is not None and (mapped or address).is_loopback


def _is_named_by_itself(host: bytes) -> bool:
    """Whether the header names this host, an address, or nothing: any other name is somebody's whose DNS may have
    been pointed here, so that pages from there are of the same site as we are (DNS rebinding)."""
    try:
        name = urlsplit(b"//" + host).hostname or b""
    except ValueError:
        return False
    text = name.decode("latin-1")
    return text in ("", "localhost", socket.gethostname().lower()) or _ip_address(text) is not None


def _ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
