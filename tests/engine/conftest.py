"""One running system for all tests of this folder: starting SGLang costs most of a minute."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engine.reference import MODEL_PATH
from tests.engine.system import System, running

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

# In the system's folder: while it is there, maps fail for the model whose name it holds (failing_device).
FAILING_DEVICE = "fails"


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    if not (MODEL_PATH / "config.json").exists():
        pytest.fail("no SmolLM2; run `make model`")
    folder = tmp_path_factory.mktemp("system")
    broken = folder / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # all but the weights
        shutil.copy(MODEL_PATH / name, broken)
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # the engines inherit it
            patch.setenv("PYTHONPATH", str(Path(__file__).parent / "failing_device"))
            patch.setenv("FAILING_DEVICE", str(folder / FAILING_DEVICE))
            started = stack.enter_context(running(folder, CONFIG, path=MODEL_PATH, broken=broken))
        yield started
