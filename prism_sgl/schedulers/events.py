"""What goes into the controller and what comes out: messages with the name of who sent or shall get them."""

from __future__ import annotations

from dataclasses import dataclass

from prism_sgl.messages import (
    ApiToRouter,
    RouterToApi,
    RouterToRuntime,
    RouterToSupervisor,
    RuntimeId,
    RuntimeToRouter,
    SupervisorToRouter,
)


@dataclass(frozen=True, slots=True)
class FromApi:
    api: str
    message: ApiToRouter


@dataclass(frozen=True, slots=True)
class FromRuntime:
    message: RuntimeToRouter


@dataclass(frozen=True, slots=True)
class FromSupervisor:
    message: SupervisorToRouter


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing happened, but time has passed."""


Event = FromApi | FromRuntime | FromSupervisor | Tick


@dataclass(frozen=True, slots=True)
class ToApi:
    api: str
    message: RouterToApi


@dataclass(frozen=True, slots=True)
class ToRuntime:
    runtime: RuntimeId
    message: RouterToRuntime


@dataclass(frozen=True, slots=True)
class ToSupervisor:
    message: RouterToSupervisor


Command = ToApi | ToRuntime | ToSupervisor


class Outbox:
    """Owner of the commands that the event at hand has brought about."""

    def __init__(self) -> None:
        self._commands: list[Command] = []

    def api(self, api: str | None, message: RouterToApi) -> None:
        if api is not None:
            self._commands.append(ToApi(api, message))

    def runtime(self, runtime: RuntimeId, message: RouterToRuntime) -> None:
        self._commands.append(ToRuntime(runtime, message))

    def supervisor(self, message: RouterToSupervisor) -> None:
        self._commands.append(ToSupervisor(message))

    def take(self) -> list[Command]:
        commands, self._commands = self._commands, []
        return commands
