"""A real process that is an owner in a ledger and does what it is told: one JSON line in, one out.

``{"arm": name}`` makes it stop for good at its next passage of that crash point: it says ``{"stopped": name}``
and waits to be killed. Run as a script, so that it shares nothing with the test that started it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from prism_sgl.allocator import crash_points
from prism_sgl.allocator.elastic_pool import ElasticPool
from prism_sgl.allocator.ledger import Kind, Ledger, Owner
from prism_sgl.allocator.page_pool import PagePool
from prism_sgl.allocator.vmm_host import HostArena
from prism_sgl.messages import RuntimeState

GRANULE_BYTES = 2 << 20
NUM_PAGES = 16


class LedgerProcess:
    """The test's end."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "property_tests.ledger_process"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, **command: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, **command: object) -> Any:
        self.send(**command)
        return self.receive()

    def kill(self) -> None:
        """SIGKILL; returns when the kernel has dropped all that the process held."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class _Worker:
    """The other end: an owner with a real arena of one-granule pages."""

    def __init__(self) -> None:
        self.ledger: Ledger | None = None
        self.owner: Owner | None = None
        self.pool: ElasticPool | None = None

    def join(self, path: str, name: str, floor: int, ceiling: int) -> bool:
        self.ledger = Ledger.open(path)
        self.owner = self.ledger.join(name, floor=floor, ceiling=ceiling, priority=0, bell="")
        self.owner.set_state(RuntimeState.AWAKE)
        self.owner.set_activity(False, 0, 0)
        pages = PagePool(page_bytes=GRANULE_BYTES, blocks_per_page=1, num_blocks=NUM_PAGES)
        self.pool = ElasticPool(HostArena(name, NUM_PAGES, GRANULE_BYTES), self.owner, pages)
        return True

    def leave(self) -> bool:
        assert self.ledger and self.owner and self.pool
        if self.pool.is_open:
            self.pool.close_all()
        self.owner.release(Kind.WEIGHTS, self.owner.held(Kind.WEIGHTS))
        self.owner.leave()
        self.pool.vmm.close()
        self.ledger.close()
        return True

    def grow(self, num_pages: int) -> bool:
        assert self.owner and self.pool
        if self.owner.view.is_asleep:
            return False
        if not self.pool.is_open and self.pool.open() is None:
            return False
        return self.pool.grow(num_pages) is not None

    def shrink(self, num_pages: int) -> int:
        """Give back the highest pages; returns how many."""
        assert self.pool
        if not self.pool.is_open:
            return 0
        pages = sorted(p for p in self.pool.pages.mapped_pages if p != self.pool.pages.pinned_page)
        chosen = pages[len(pages) - num_pages :] if num_pages < len(pages) else pages
        self.pool.shrink([range(p, p + 1) for p in chosen])
        return len(chosen)

    def reserve(self, granules: int) -> bool:
        assert self.owner
        return self.owner.try_reserve(Kind.WEIGHTS, granules)

    def release(self, granules: int) -> int:
        assert self.owner
        amount = min(granules, self.owner.held(Kind.WEIGHTS))
        self.owner.release(Kind.WEIGHTS, amount)
        return amount

    def sleep(self) -> bool:
        """Without KV; the weights stay until somebody asks for them."""
        assert self.owner and self.pool
        self.pool.close_all()
        self.owner.set_state(RuntimeState.ASLEEP)
        return self.owner.target() is None

    def wake(self, granules: int) -> bool:
        """With so many granules of weights more; asleep again on shortage."""
        assert self.owner
        self.owner.set_state(RuntimeState.WAKING)
        woken = self.owner.try_reserve(Kind.WEIGHTS, granules)
        self.owner.set_state(RuntimeState.AWAKE if woken else RuntimeState.ASLEEP)
        return woken and self.owner.target() is None

    def post(self, granules: int) -> list[tuple[str, int]]:
        assert self.owner
        return [(p.name, p.granules) for p in self.owner.post_targets(granules, 3600.0)]

    def answer(self) -> int:
        """Shrink to the target, as a runtime does at its safe point; returns the granules given."""
        assert self.owner and self.pool
        target = self.owner.target()
        if target is None:
            return 0
        excess = max(0, self.owner.view.elastic - target.granules)
        given = self.release(excess) if self.owner.view.is_asleep else self.shrink(excess)
        self.owner.answer_target(target.seq)
        return given

    def held(self) -> dict[str, int]:
        assert self.owner and self.pool
        self.pool.check()
        return {
            "kv": self.owner.held(Kind.KV),
            "weights": self.owner.held(Kind.WEIGHTS),
            "physical": self.pool.vmm.physical_bytes() // GRANULE_BYTES,
        }

    def arm(self, name: str) -> bool:
        armed = name

        def stop(name: str) -> None:
            if name == armed:
                print(json.dumps({"stopped": name}), flush=True)
                sys.stdin.read()  # for ever: the other end never closes it before it kills us

        crash_points.crash_point = stop
        return True


def main() -> None:
    worker = _Worker()
    for line in sys.stdin:
        command = json.loads(line)
        verb = command.pop("do")
        print(json.dumps(getattr(worker, verb)(**command)), flush=True)


if __name__ == "__main__":
    main()
