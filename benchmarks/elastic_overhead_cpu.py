"""Tokens per second of one model: our elastic pool against SGLang's stock pools, on the CPU.

Both servers run side by side, each idle while the other is measured, and answer the same batch in turn, so that
the machine's moods hit both alike. Usage: ``python -m benchmarks.elastic_overhead_cpu [--pairs 7]``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("~/.cache/prism_sgl/models/smollm2").expanduser()
TARGET = 0.98
BATCH, PROMPT_TOKENS, NEW_TOKENS = 8, 128, 64
CONFIG = """
[server]
port = {port}
run_dir = "{folder}/run"
[[devices]]
name = "host0"
kind = "host"
memory = "1GiB"
[models.chat]
path = "{model}"
max_kv = "128MiB"
engine_args = {{ context_length = 1024, max_running_requests = 16 }}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def elastic_server(folder: Path) -> Iterator[str]:
    port = free_port()
    (folder / "models.toml").write_text(CONFIG.format(port=port, folder=folder, model=MODEL))
    command = [sys.executable, "-m", "prism_sgl.launch", "--config", str(folder / "models.toml")]
    with serving(command, dict(os.environ), folder / "elastic.log"):
        yield f"http://127.0.0.1:{port}/m/chat"


@contextlib.contextmanager
def stock_server(folder: Path) -> Iterator[str]:
    """SGLang's own server and pools; the CPU needs an out-of-tree platform, the tests' plain one."""
    port = free_port()
    environment = dict(os.environ) | {
        "PYTHONPATH": str(ROOT / "tests/engine/plain_platform"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WITNESS_FILE": str(folder / "witness.json"),
    }
    options = f"""--model-path {MODEL} --port {port} --device cpu --attention-backend torch_native
        --sampling-backend pytorch --grammar-backend llguidance --max-total-tokens 5825 --context-length 1024
        --max-running-requests 16 --disable-overlap-schedule --disable-cuda-graph --skip-server-warmup
        --sleep-on-idle --mem-fraction-static 0.5"""
    with serving(
        [sys.executable, "-m", "sglang.launch_server", *options.split()], environment, folder / "stock.log"
    ):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def serving(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_it_answers(url: str) -> None:
    deadline = time.monotonic() + 240
    while True:
        with contextlib.suppress(httpx.HTTPError):
            body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 1}}
            if httpx.post(f"{url}/generate", json=body, timeout=120).status_code == 200:
                return
        if time.monotonic() > deadline:
            raise SystemExit(f"{url} did not come up within 240 s")
        time.sleep(0.2)


def tokens_per_second(url: str, seed: int) -> float:
    prompts = [
        [(seed * 7919 + r * 503 + i * 31) % 40000 + 100 for i in range(PROMPT_TOKENS)] for r in range(BATCH)
    ]
    body = {
        "input_ids": prompts,
        "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True},
    }
    began = time.perf_counter()
    httpx.post(f"{url}/generate", json=body, timeout=300).raise_for_status()
    return BATCH * (PROMPT_TOKENS + NEW_TOKENS) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with elastic_server(folder) as ours, stock_server(folder) as stock:
            print("starting both servers ...", flush=True)
            for url in (ours, stock):
                wait_until_it_answers(url)
            rates: dict[str, list[float]] = {"ours": [], "stock": []}
            for pair in range(pairs + 1):  # the first pair warms up
                order = [("ours", ours), ("stock", stock)]
                for who, url in order if pair % 2 else order[::-1]:
                    rate = tokens_per_second(url, pair)
                    if pair:
                        rates[who].append(rate)
                        print(f"pair {pair}: {who:5} {rate:7.1f} tokens/s", flush=True)
    ratios = [a / b for a, b in zip(rates["ours"], rates["stock"], strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"ratio ours/stock: median {ratio:.3f}, {min(ratios):.3f} to {max(ratios):.3f} (target >= {TARGET})"
    )
    row = {
        "what": f"tokens/s in + out, {BATCH} x ({PROMPT_TOKENS} in + {NEW_TOKENS} out), median of {pairs} pairs",
        "ours": round(statistics.median(rates["ours"]), 1),
        "peer": round(statistics.median(rates["stock"]), 1),
        "unit": "tokens/s",
        "ratio": round(ratio, 3),
        "ratios": [round(r, 3) for r in ratios],
        "target": f">= {TARGET}",
        "met": ratio >= TARGET,
    }
    result = {
        "name": "elastic_overhead_cpu",
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.elastic_overhead_cpu --pairs {pairs}",
        "machine": {"cores": os.cpu_count()},
        "rows": [row],
    }
    (ROOT / "benchmarks/results/elastic_overhead_cpu.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
