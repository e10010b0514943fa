"""The runtimes that the supervisor has started and whose end it has not reported yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prism_sgl import addresses
from prism_sgl.config import Config, DeviceConfig, ModelConfig, log_dir
from prism_sgl.launch.run_dir import remove_listed
from prism_sgl.messages import RuntimeId, RuntimeSpec


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


def remove_files(spec: RuntimeSpec) -> None:
    """What a killed worker could not remove itself."""
    runtime_socket = addresses.runtime_requests(spec.run_dir, spec.runtime).removeprefix("ipc://")
    for path in (runtime_socket, addresses.phases(spec.run_dir, spec.runtime)):
        Path(path).unlink(missing_ok=True)
    remove_listed(Path(addresses.shared_files(spec.run_dir, spec.runtime)))
