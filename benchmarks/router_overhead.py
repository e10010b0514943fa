"""What api_server and router cost a request: the same app behind uvicorn, and behind prism_sgl.

``python -m benchmarks.router_overhead`` writes benchmarks/results/router_overhead.json. Open loop at 100 requests/s
in blocks of a second, one server after the other, so that both see the same machine; then as fast as they can.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import uvloop

from tests.launch.stack import Program, running

RESULTS = Path(__file__).parent / "results" / "router_overhead.json"
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
BODY = {
    "model": "chat",
    "messages": [{"role": "user", "content": "hello " * 100}],
    "stream": True,
    "chunks": 4,
}


class Connection(asyncio.Protocol):
    """One keep-alive connection; a request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[float] | None = None
        self._first_at = 0.0
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of its own class

    def data_received(self, data: bytes) -> None:
        if not self._data:
            self._first_at = time.perf_counter()
        self._data += data
        if self._data.endswith(b"\r\n0\r\n\r\n") and self._done is not None:
            assert self._data.startswith(b"HTTP/1.1 200"), self._data[:300]
            self._data = b""
            self._done.set_result(self._first_at)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionResetError())

    async def ask(self, request: bytes) -> float:
        """Seconds to the first byte."""
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self._transport.write(request)
        return await self._done - began

    @property
    def is_closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()


@dataclass
class Client:
    """Connections to one server, made as they are needed."""

    port: int
    idle: list[Connection] = field(default_factory=list)

    def __post_init__(self) -> None:
        body = json.dumps(BODY).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        self.request = head.encode() + b"content-type: application/json\r\n\r\n" + body

    async def ask(self) -> float:
        while self.idle and self.idle[-1].is_closed:  # by the server: idle for too long
            self.idle.pop()
        if self.idle:
            connection = self.idle.pop()
        else:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(Connection, "127.0.0.1", self.port)
        seconds = await connection.ask(self.request)
        self.idle.append(connection)
        return seconds

    async def open_loop(self, rate: float, seconds: float) -> list[float]:
        began = time.perf_counter()
        tasks = []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask()))
        return list(await asyncio.gather(*tasks))

    async def saturate(self, num_connections: int, seconds: float) -> float:
        """Requests a second."""
        end = time.perf_counter() + seconds
        num_done = 0

        async def again() -> None:
            nonlocal num_done
            while time.perf_counter() < end:
                await self.ask()
                num_done += 1

        began = time.perf_counter()
        await asyncio.gather(*(again() for _ in range(num_connections)))
        return num_done / (time.perf_counter() - began)


def cpu_s(pid: int) -> float:
    """User and system seconds of a process, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


async def saturate(
    client: Client, pids: Mapping[str, int], seconds: float, connections: int
) -> tuple[float, dict[str, float]]:
    """Requests a second, and CPU seconds a request of each process."""
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    began = time.perf_counter()
    rate = await client.saturate(connections, seconds)
    num_requests = rate * (time.perf_counter() - began)
    return rate, {name: (cpu_s(pid) - before[name]) / num_requests for name, pid in pids.items()}


def percentile(values: Sequence[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


def row(
    what: str, ours: float, peer: float, unit: str, target: str = "", met: bool | None = None
) -> dict[str, object]:
    ratio = round(ours / peer, 3) if peer else None
    return {
        "what": what,
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "unit": unit,
        "ratio": ratio,
        "target": target,
        "met": met,
    }


async def measure(
    ours: Client, direct: Client, pids: Mapping[str, int], direct_pid: int, args: argparse.Namespace
) -> list[dict[str, object]]:
    for client in (direct, ours):
        await client.open_loop(args.rate, 1.0)  # connections, caches
    ours_s: list[float] = []
    direct_s: list[float] = []
    for _ in range(args.blocks):
        direct_s += await direct.open_loop(args.rate, 1.0)
        ours_s += await ours.open_loop(args.rate, 1.0)
    rows = []
    for name, share, limit_ms in (("median", 0.5, 1.0), ("p99", 0.99, 5.0)):
        ours_ms, direct_ms = percentile(ours_s, share) * 1e3, percentile(direct_s, share) * 1e3
        rows.append(row(f"time to first byte, {name}", ours_ms, direct_ms, "ms"))
        added_ms = ours_ms - direct_ms
        rows.append(
            row(
                f"added to first byte, {name}", added_ms, 0.0, "ms", f"< {limit_ms:g} ms", added_ms < limit_ms
            )
        )
    me = {"client": os.getpid()}
    direct_rate, direct_cpu = await saturate(
        direct, {"server": direct_pid, **me}, args.seconds, args.connections
    )
    ours_rate, ours_cpu = await saturate(ours, {**pids, **me}, args.seconds, args.connections)
    rows.append(row("requests at saturation", ours_rate, direct_rate, "1/s"))
    for name, seconds in ours_cpu.items():
        peer = direct_cpu.get({"engine": "server"}.get(name, name), 0.0)
        rows.append(row(f"CPU of {name} at saturation", seconds * 1e6, peer * 1e6, "us/request"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--blocks", type=int, default=10, help="seconds of open loop a server")
    parser.add_argument("--seconds", type=float, default=4.0, help="of saturation a server")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--serve", type=int, metavar="FD", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve)
        return
    with running(("chat",)) as stack, socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        direct = Program("benchmarks.router_overhead", ["--serve", str(fd)], fds=[fd])
        direct.line("ready")
        pids = {
            "api_server": stack.api.process.pid,
            "router": stack.router.process.pid,
            "engine": stack.engine("chat").process.pid,
        }
        port = listener.getsockname()[1]
        try:
            rows = uvloop.run(measure(Client(stack.port), Client(port), pids, direct.process.pid, args))
        finally:
            direct.kill()
    for entry in rows:
        ratio = f"  x{entry['ratio']}" if entry["ratio"] is not None else ""
        target = (
            f"  target {entry['target']}: {'met' if entry['met'] else 'MISSED'}" if entry["target"] else ""
        )
        print(
            f"{entry['what']:34} {entry['ours']:>10} against {entry['peer']:>10} {entry['unit']}{ratio}{target}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    result = {
        "name": "router_overhead",
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.router_overhead {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, loopback; "
        f"load average {os.getloadavg()[0]:.1f}",
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def serve(fd: int) -> None:
    """The peer: the engine's app behind uvicorn."""
    import uvicorn

    from tests.fake_engine import Holds, build_app

    async def run() -> None:
        config = uvicorn.Config(build_app(Holds(), "chat"), log_config=None, access_log=False)
        print("ready", flush=True)
        await uvicorn.Server(config).serve(sockets=[socket.socket(fileno=fd)])

    uvloop.run(run())


if __name__ == "__main__":
    main()
