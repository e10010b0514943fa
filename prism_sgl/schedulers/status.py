"""The controller's state in words and numbers, for people and metrics."""

from __future__ import annotations

from prism_sgl.messages import DeviceStatus, ModelStatus, RuntimeStatus, Status
from prism_sgl.schedulers.activation import Activation
from prism_sgl.schedulers.balancer import Balancer
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.records import COLD, FAILED, STARTING, WAKING, Model
from prism_sgl.schedulers.request_table import RequestTable

_SILENT_S = 10.0  # runtimes beat once a second; the supervisor, not this, decides that one is dead


def build(
    epoch: int,
    fleet: Fleet,
    table: RequestTable,
    activation: Activation,
    balancer: Balancer,
    now: float,
) -> Status:
    pressures = balancer.pressures(now)
    return Status(
        epoch=epoch,
        models=[_model(model, table, now) for model in fleet.models.values()],
        devices=[
            DeviceStatus(
                name=device.name,
                budget_bytes=device.budget_bytes,
                charged_bytes=device.charged_bytes,
                kvpr=activation.kvpr(device, now),
                kv_pressure=pressures[device.name].kv,
                compute_pressure=pressures[device.name].compute,
            )
            for device in fleet.devices.values()
        ],
        events=list(fleet.events),
    )


def _model(model: Model, table: RequestTable, now: float) -> ModelStatus:
    runtime, latency = model.runtime, model.latency
    slacks = [
        request.deadline - now - latency.estimate_s(request.prompt_tokens)
        for request in table.queued(model.name).values()
    ]
    return ModelStatus(
        name=model.name,
        state=runtime.state,
        device=runtime.device,
        runtime=runtime.id,
        queued=len(table.queued(model.name)),
        in_flight=sum(len(table.running(each.id)) for each in model.runtimes),
        weights_bytes=runtime.weights_bytes,
        kv_bytes=runtime.kv_bytes,
        pinned=model.pinned,
        reason=_reason(model, now),
        wakes=model.wakes,
        sleeps=model.sleeps,
        starts=model.starts,
        moves=model.moves,
        others=[
            RuntimeStatus(runtime=each.id, device=each.device, state=each.state, role=each.role.value)
            for each in model.others
            if each.id is not None and each.device is not None
        ],
        last_wake_s=model.last_wake_s,
        last_sleep_s=model.last_sleep_s,
        slack_s=min(slacks, default=None),
        late=sum(slack < 0.0 for slack in slacks),
        prefill_alpha_s=latency.alpha_s,
        prefill_tokens_per_s=1.0 / latency.s_per_token if latency.s_per_token > 0.0 else 0.0,
        hit_ratio=latency.hit_ratio,
        answer_tokens=model.answers.typical,
    )


def _reason(model: Model, now: float) -> str:
    runtime = model.runtime
    if runtime.known and (silent_s := now - runtime.heard_at) > _SILENT_S:
        return f"silent for {silent_s:.0f} s"
    if runtime.state in (STARTING, WAKING):
        return f"{model.reason}; {runtime.state} for {now - runtime.since:.0f} s"
    if runtime.state in (COLD, FAILED) and not model.reason:
        return "not loaded yet"
    return model.reason
