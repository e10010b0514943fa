"""The runtimes that the supervisor has started and whose end it has not reported yet."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from prism_sgl import addresses
from prism_sgl.config import Config, DeviceConfig, ModelConfig, log_dir
from prism_sgl.errors import ConfigError
from prism_sgl.launch.run_dir import remove_listed
from prism_sgl.messages import RuntimeId, RuntimeSpec

KEPT_LOGS = 10  # of a model's runtimes that have ended


@dataclass
class Runtime:
    """``pid`` is None until a process has the spec; ``kill_reason`` is set once its end is wanted."""

    spec: RuntimeSpec
    pid: int | None = None
    ready: bool = False
    kill_reason: str | None = None


def build_spec(
    config: Config,
    runtime: RuntimeId,
    model: ModelConfig,
    device: DeviceConfig,
    run_dir: Path,
    ledger_path: str,
) -> RuntimeSpec:
    file_name = Path(addresses.phases("", runtime)).with_suffix("").name
    return RuntimeSpec(
        runtime=runtime,
        model=model.name,
        path=model.path,
        device=device.name,
        device_kind=device.kind,
        device_index=device.index,
        ledger_path=ledger_path,
        run_dir=str(run_dir),
        floor_bytes=model.min_kv_bytes,
        ceiling_bytes=model.max_kv_bytes,
        priority=model.priority,
        kv_share=model.kv_share,
        block_tokens=model.block_tokens,
        kv_page_bytes=config.memory.kv_page_bytes,
        weights_page_bytes=config.memory.weights_page_bytes,
        engine_args=model.engine_args,
        env=model.env,
        log_path=f"{log_dir(config)}/{file_name}.log",
        log_level=config.server.log_level,
        weights_bytes=model.weights_bytes,
    )


def make_log_dir(config: Config) -> None:
    """Raises ConfigError if nothing can be written there."""
    path = Path(log_dir(config))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        problem = f'is "{path}", which cannot be written to ({error.strerror})'
        remedy = "give a folder that this user may write to, or leave it out"
        raise ConfigError("server.log_dir", problem, remedy, file=config.file) from None


def begin_log(path: Path, living: Collection[Path]) -> None:
    """Nothing of an earlier launch shall be in it; of its model's other logs the newest ``KEPT_LOGS`` stay.

    ``living``: logs that runtimes write to.
    """
    of_model = glob.escape(path.name.rpartition("@")[0])
    with contextlib.suppress(OSError):  # somebody else tidies up there too, or may write there and we may not
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            os.replace(path, f"{path}.old")
        ended = set(path.parent.glob(f"{of_model}@*.log*")).difference(living)
        for old in sorted(ended, key=lambda log: log.stat().st_mtime_ns, reverse=True)[KEPT_LOGS:]:
            old.unlink(missing_ok=True)


def remove_files(spec: RuntimeSpec) -> None:
    """What a killed worker could not remove itself."""
    runtime_socket = addresses.runtime_requests(spec.run_dir, spec.runtime).removeprefix("ipc://")
    for path in (runtime_socket, addresses.phases(spec.run_dir, spec.runtime)):
        Path(path).unlink(missing_ok=True)
    remove_listed(Path(addresses.shared_files(spec.run_dir, spec.runtime)))
