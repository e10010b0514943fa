"""Installed is not active: SGLang's own server, started beside us in the same environment, is untouched."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.engine.reference import MODEL_PATH

pytestmark = pytest.mark.engine


def test_plain_launch_server_runs_as_if_we_were_not_installed(tmp_path: Path) -> None:
    """The CPU needs an out-of-tree platform; a test-only one stands in, with a witness in the scheduler."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PRISM_", "SGLANG_"))}
    environment |= {
        "PYTHONPATH": str(Path(__file__).parent / "plain_platform"),
        "WITNESS_FILE": str(tmp_path / "witness.json"),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),
    }
    options = {
        "--model-path": str(MODEL_PATH),
        "--port": str(port),
        "--device": "cpu",
        "--attention-backend": "torch_native",
        "--sampling-backend": "pytorch",
        "--grammar-backend": "none",
        "--max-total-tokens": "512",
        "--max-running-requests": "2",
        "--context-length": "256",
    }
    command = [sys.executable, "-m", "sglang.launch_server", *(x for pair in options.items() for x in pair)]
    command += ["--disable-overlap-schedule", "--disable-cuda-graph", "--skip-server-warmup"]
    shared_memory = set(Path("/dev/shm").glob("sglang_loads_*"))
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        witness = tmp_path / "witness.json"
        deadline = time.monotonic() + 240
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            try:
                httpx.get(f"http://127.0.0.1:{port}/model_info", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/generate",
            json={
                "text": "The capital of France is",
                "sampling_params": {"max_new_tokens": 2, "temperature": 0},
            },
            timeout=60,
        ).json()
        assert answer["text"].startswith(" Paris")
        seen = json.loads(witness.read_text())
    finally:
        os.killpg(server.pid, 9)
        server.wait()
        for left in set(Path("/dev/shm").glob("sglang_loads_*")) - shared_memory:
            left.unlink()  # a killed SGLang cannot remove it
    assert seen == {
        "pool": "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool",
        "allocator": "sglang.srt.mem_cache.allocator.token",
        "hooks": [],
        "rpc": [],
        "engine_modules": [],
    }
