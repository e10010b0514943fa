"""What both backends keep of an arena's pages: which may be touched, which hold memory, which call is a mistake."""

from __future__ import annotations

from collections.abc import Sequence

from prism_sgl.allocator.vmm import merge_runs

UNMAPPED, MAPPED, STUCK = 0, 1, 2


class ArenaPages:
    """Owns the states of an arena's pages (vmm.Vmm says what they mean). The backends change them by ``_mark`` only."""

    def __init__(self, name: str, num_pages: int, page_bytes: int, unit_bytes: int) -> None:
        """``unit_bytes``: what a page must be a multiple of."""
        if num_pages <= 0 or page_bytes <= 0 or page_bytes % unit_bytes:
            raise ValueError(f"{num_pages} pages of {page_bytes} bytes")
        self.name = name
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self._states = bytearray(num_pages)
        self._is_open = True

    @property
    def size_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def mapped_bytes(self) -> int:
        return self._states.count(MAPPED) * self.page_bytes

    @property
    def held_bytes(self) -> int:
        return (self.num_pages - self._states.count(UNMAPPED)) * self.page_bytes

    def is_mapped(self, page: int) -> bool:
        return self._states[page] == MAPPED

    def _checked(self, runs: Sequence[range], *, mapped: bool) -> list[range]:
        """The runs, merged, all of whose pages must be mapped (or none)."""
        if not self._is_open:
            raise ValueError(f"{self.name} is closed")
        merged = merge_runs(runs)
        for run in merged:
            if run.start < 0 or run.stop > self.num_pages:
                raise ValueError(f"{self.name} has no pages {run}: it has {self.num_pages}")
            if any((self._states[page] == MAPPED) is not mapped for page in run):
                raise ValueError(f"{self.name}: pages {run} are {'not all' if mapped else 'partly'} mapped")
        return merged

    def _check_span(self, offset: int, size_bytes: int) -> None:
        """These bytes lie in the arena, on mapped pages."""
        if offset < 0 or offset + size_bytes > self.size_bytes:
            raise ValueError(f"{size_bytes} bytes at {offset} do not fit into {self.size_bytes}")
        if size_bytes:
            last = (offset + size_bytes - 1) // self.page_bytes
            self._checked([range(offset // self.page_bytes, last + 1)], mapped=True)

    def _span_of(self, run: range) -> tuple[int, int]:
        """(offset, size) in bytes."""
        return run.start * self.page_bytes, len(run) * self.page_bytes

    def _mark(self, run: range, state: int) -> None:
        self._states[run.start : run.stop] = bytes([state]) * len(run)
