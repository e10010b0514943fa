"""A waiting worker: does the imports of an engine's three processes, then blocks until it is given a spec.

``python -m prism_sgl.engine.waiting --fd FD --parent PID --kind KIND``, started by the standby as the leader of a
session; FD is a SOCK_SEQPACKET pair: Imported or ImportsFailed out, one TakeSpec in. Until then it logs to the
standby's log, and it holds nothing of the card: SGLang's scheduler makes the CUDA context once it knows its model.

Light on purpose: SGLang's children import this module as their main module.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import time
from multiprocessing.connection import wait

from prism_sgl import messages
from prism_sgl.engine.early_children import EarlyChildError, EarlyChildren
from prism_sgl.engine.processes import die_with_parent, log_to, run_to_exit
from prism_sgl.engine.spec import announce_device_kind
from prism_sgl.messages import Imported, ImportsFailed, TakeSpec

log = logging.getLogger(__name__)
_MESSAGE_BYTES = 1 << 20
_REASON_CHARACTERS = 2000  # the standby reads 64 KiB at most


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m prism_sgl.engine.waiting", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="our end of the standby's socket pair")
    parser.add_argument("--parent", type=int, required=True, help="pid of the standby")
    parser.add_argument("--kind", choices=("host", "cuda"), required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the standby ignores it, and that is inherited
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    channel = socket.socket(fileno=arguments.fd)
    channel.set_inheritable(False)
    run_to_exit(lambda: _wait_and_serve(channel, arguments.kind))


def _wait_and_serve(channel: socket.socket, kind: str) -> None:
    try:
        early = _import(channel, kind)
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS]
        channel.send(messages.encode_json(ImportsFailed(reason=reason)))
        raise
    task = _receive(channel, early)
    channel.close()
    if task is None:
        return
    log_to(task.spec.log_path)
    log.info("%d has waited, and becomes %s", os.getpid(), task.spec.runtime)
    from prism_sgl.engine.worker import serve

    serve(task.spec, wanted_at_s=task.wanted_at_s, early=early)


def _import(channel: socket.socket, kind: str) -> EarlyChildren:
    """Ours and the children's, at the same time."""
    began = time.monotonic()
    announce_device_kind(kind)
    early = EarlyChildren()
    import sglang.srt.entrypoints.http_server  # noqa: F401
    from sglang.srt.plugins import load_plugins

    from prism_sgl.engine.seams import prove_hooks

    load_plugins()
    prove_hooks()
    import prism_sgl.engine.bridge
    import prism_sgl.engine.control
    import prism_sgl.engine.launching
    import prism_sgl.engine.worker  # noqa: F401

    own_s = time.monotonic() - began
    seconds = early.wait_ready()
    each = ", ".join(f"{name} {s:.1f} s" for name, s in {"worker": own_s, **seconds}.items())
    log.info("imports of %d: %s", os.getpid(), each)
    channel.send(messages.encode_json(Imported(seconds=time.monotonic() - began)))
    return early


def _receive(channel: socket.socket, early: EarlyChildren) -> TakeSpec | None:
    """Block until there is a spec; None: the standby does not want us any more."""
    if channel not in wait([channel, *early.sentinels()]):
        raise EarlyChildError("scheduler or detokenizer ended while they waited for a spec")
    data = channel.recv(_MESSAGE_BYTES)
    return messages.decode_standby_to_waiting(data) if data else None


if __name__ == "__main__":
    main()
