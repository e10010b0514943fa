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


def mounts(text: str) -> dict[str, None] | None:
    """For httpx's clients, which ask what HTTP_PROXY names for the way to this host itself too."""
    host = httpx.URL(text).host
    try:
        is_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = host == "localhost"
    return dict.fromkeys(("http://", "https://", "all://")) if is_here else None
