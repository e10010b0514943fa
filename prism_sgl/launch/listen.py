"""The HTTP address, bound by the supervisor: a taken port is told before anything starts, and connections
that arrive while an api_server starts again wait in the backlog instead of being refused."""

from __future__ import annotations

import errno
import socket

from prism_sgl.errors import ConfigError, PortInUseError

_BACKLOG = 1024


def listen(host: str, port: int, *, file: str) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(
            "server.host", f'is "{host}" ({error.strerror})', 'give e.g. "127.0.0.1"', file=file
        ) from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"{file}: server.port is {port}, which is in use on {host}; "
                "stop what listens there or give another port"
            ) from None
        key = "server.port" if error.errno in (errno.EACCES, errno.EPERM) else "server.host"
        shown = port if key == "server.port" else f'"{host}"'
        remedy = (
            "give a port above 1023"
            if key == "server.port"
            else 'give an address of this machine, e.g. "127.0.0.1"'
        )
        raise ConfigError(key, f"is {shown} ({error.strerror})", remedy, file=file) from None
    return listener
