"""One running system for all tests of this folder: starting SGLang costs most of a minute."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.reference import MODEL_PATH
from tests.engine.system import System

# float32: greedy tokens then do not depend on how requests are batched. A token takes 45 KiB of KV, weights take
# 514 MiB, a floor 26 MiB. chat's blocks are single tokens, code's are of 16. Both fit awake, but only one of them
# can have its ceiling while the other has its floor. chat's admission is bold, so that it runs out and retracts.
CONFIG = """
[server]
port = {port}
run_dir = "{run_dir}"
log_dir = "{log_dir}"
drain_timeout = "2s"
[scheduler]
min_residence = "0s"
[memory]
weights_page = "2MiB"
[[devices]]
name = "host0"
kind = "host"
memory = "1120MiB"
[models.chat]
path = "{path}"
aliases = ["small"]
max_kv = "64MiB"
[models.chat.engine_args]
context_length = 512
dtype = "float32"
chunked_prefill_size = 128
max_running_requests = 16
schedule_conservativeness = 0.3
[models.broken]
path = "{broken}"
engine_args = {{ context_length = 512 }}
[models.code]
path = "{path}"
block_tokens = 16
max_kv = "64MiB"
[models.code.engine_args]
context_length = 512
dtype = "float32"
chunked_prefill_size = 128
max_running_requests = 16
"""


def our_shared_files() -> set[Path]:
    return {f for f in Path("/dev/shm").iterdir() if f.name.startswith(("prism_sgl", "sglang_loads"))}


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    if not (MODEL_PATH / "config.json").exists():
        pytest.fail("no SmolLM2; run `make model`")
    folder = tmp_path_factory.mktemp("system")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = Path(folder / "models.toml")
    run_dir, log_dir = folder / "run", folder / "logs"
    broken = folder / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # all but the weights
        shutil.copy(MODEL_PATH / name, broken)
    config.write_text(
        CONFIG.format(port=port, run_dir=run_dir, log_dir=log_dir, path=MODEL_PATH, broken=broken)
    )
    shared_memory = our_shared_files()
    running = System(config, run_dir, log_dir, port)
    try:
        running.wait_ready()
        yield running
    finally:
        processes = running.processes()
        code = running.stop()
    assert code == 0, "\n".join(running.lines)
    # No orphan and no file is left behind, whatever the tests have killed.
    assert not [line for pid, line in processes.items() if Path(f"/proc/{pid}").exists()]
    assert our_shared_files() <= shared_memory
    assert not run_dir.exists()
