"""Parent of all workers of one device: it has paid SGLang's imports, so a worker costs a fork (host devices).

The supervisor speaks JSON with it over a SOCK_SEQPACKET pair: Spawn and Kill in, StandbyReady, Spawned and
WorkerExited out. Each worker is the leader of a session of its own; when it ends, the rest of its session is
killed, and WorkerExited is sent only when the last process is gone: orphans become our children (subreaper),
so there is none that we do not see. One thread, no event loop: what forks must have neither.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import socket
import tempfile
import time
import traceback

from prism_sgl import messages
from prism_sgl.engine import spec as spec_channel
from prism_sgl.engine.processes import adopt_orphans, die_with_parent, log_to
from prism_sgl.messages import (
    Kill,
    RuntimeId,
    RuntimeSpec,
    Spawn,
    Spawned,
    StandbyReady,
    StandbyToSupervisor,
    WorkerExited,
)

log = logging.getLogger(__name__)
_MESSAGE_BYTES = 1 << 20


class Standby:
    """Owns the table of living workers."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.workers: dict[int, RuntimeId] = {}  # leaders that live
        self.ending: dict[
            int, tuple[RuntimeId, int]
        ] = {}  # leaders that ended, their session not yet: exit code
        self.deadlines: dict[int, float] = {}  # SIGKILL to the session at this time
        self._wake_read, wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)

    def run(self) -> None:
        """Until the supervisor closes its end; then every worker is killed."""
        try:
            while True:
                descriptors = [self.channel.fileno(), self._wake_read]
                ready, _, _ = select.select(descriptors, [], [], self._timeout())
                if self._wake_read in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, 4096)
                self._reap()
                self._kill_overdue()
                if self.channel.fileno() in ready and not self._obey():
                    return
        finally:
            for pid in [*self.workers, *self.ending]:
                _kill_session(pid, signal.SIGKILL)

    def _obey(self) -> bool:
        data = self.channel.recv(_MESSAGE_BYTES)
        if not data:
            return False
        match messages.decode_supervisor_to_standby(data):
            case Spawn(spec=spec):
                self._spawn(spec)
            case Kill(runtime=runtime, grace_s=grace_s):
                for pid in [pid for pid, name in self.workers.items() if name == runtime]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
                    self.deadlines[pid] = time.monotonic() + grace_s
        return True

    def _spawn(self, spec: RuntimeSpec) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(spec, parent)
        self.workers[pid] = spec.runtime
        self._tell(Spawned(runtime=spec.runtime, pid=pid))

    def _become_worker(self, spec: RuntimeSpec, parent: int) -> None:
        """In the child: never returns, and never runs the parent's exit handlers."""
        code = 1
        try:
            die_with_parent(parent)
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.channel.close()
            log_to(spec.log_path)
            tempfile.tempdir = None  # the parent may have cached another
            from prism_sgl.engine.worker import serve

            serve(spec)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pid = 0
            if pid == 0:
                break
            runtime = self.workers.pop(pid, None)
            if runtime is not None:
                self.ending[pid] = (runtime, os.waitstatus_to_exitcode(status))
                self.deadlines.pop(pid, None)
        for pid, (runtime, exit_code) in list(self.ending.items()):
            if not _kill_session(pid, signal.SIGKILL):
                del self.ending[pid]
                self._tell(WorkerExited(runtime=runtime, pid=pid, exit_code=exit_code))

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for pid, deadline in list(self.deadlines.items()):
            if now >= deadline:
                del self.deadlines[pid]
                _kill_session(pid, signal.SIGKILL)

    def _timeout(self) -> float | None:
        if self.ending:
            return 0.01  # a killed session's last process may be an adopted orphan whose end comes by SIGCHLD
        if self.deadlines:
            return max(0.0, min(self.deadlines.values()) - time.monotonic())
        return None

    def _tell(self, message: StandbyToSupervisor) -> None:
        self.channel.send(messages.encode_json(message))


def _kill_session(leader: int, signum: int) -> bool:
    """Signal the leader's process group; False when no process of it is left."""
    try:
        os.killpg(leader, signum)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m prism_sgl.engine.standby", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="our end of the supervisor's socket pair")
    parser.add_argument("--kind", choices=("host", "cuda"), required=True)
    parser.add_argument("--index", type=int, default=0, help="index of the device among its kind")
    arguments = parser.parse_args()
    began = time.perf_counter()
    adopt_orphans()
    # The supervisor ends us by closing the socket pair, and its death by PDEATHSIG, which it sets for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    spec_channel.announce_device_kind(arguments.kind)
    # The imports of worker, scheduler and detokenizer, paid once for all of them.
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.models.registry  # noqa: F401  (all model classes: 6 s)
    from sglang.srt.plugins import load_plugins

    from prism_sgl.engine.seams import prove_hooks

    load_plugins()
    prove_hooks()
    import prism_sgl.engine.worker  # noqa: F401

    channel = socket.socket(fileno=arguments.fd)
    channel.send(messages.encode_json(StandbyReady(seconds=time.perf_counter() - began)))
    Standby(channel).run()
    # No interpreter shutdown: torch and SGLang need seconds for it, and nothing of ours is left to close.
    os._exit(0)


if __name__ == "__main__":
    main()
