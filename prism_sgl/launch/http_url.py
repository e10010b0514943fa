"""What a user gave as the address of a server: whether httpx can be asked to connect to it, and by which way."""

from __future__ import annotations

import ipaddress

import httpx


def is_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host) and 0 < (url.port or 80) < 65536


def is_loopback(text: str) -> bool:
    """Nothing that HTTP_PROXY names leads to this host itself; httpx would ask it all the same."""
    host = httpx.URL(text).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
