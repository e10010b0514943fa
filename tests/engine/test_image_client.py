"""Memory for an image is made while the model loads, and given back where nobody takes it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from prism_sgl.allocator.image import Image
from prism_sgl.engine.image_client import ImageMemory
from prism_sgl.errors import VmmError

MIB = 1 << 20


class Locks:
    """Page locks that are held, by size."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def __call__(self, source: memoryview) -> Callable[[], None]:
        size_bytes = source.nbytes
        self.held.append(size_bytes)
        return lambda: self.held.remove(size_bytes)


def images_open() -> int:
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum("prism-image:made" in link for link in links)


@pytest.mark.parametrize("guess", [0, MIB, 4 * MIB], ids=["no guess", "too little", "too much"])
def test_the_guess_is_cut_or_extended(guess: int) -> None:
    locks = Locks()
    memory = ImageMemory("made", guess, locks)
    image = memory.take(2 * MIB)
    memory.close()
    assert image.is_page_locked and locks.held == [2 * MIB]
    status = os.fstat(image.fileno())
    assert (image.size_bytes, status.st_size, status.st_blocks * 512) == (2 * MIB, 2 * MIB, 2 * MIB)
    image.close()
    assert images_open() == 0 and not locks.held


def test_closing_waits_for_nothing_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another runtime has made the image, a start must not wait for memory that it does not need."""
    may_go, gone = threading.Event(), threading.Event()
    locks = Locks()

    def slowly(source: memoryview) -> Callable[[], None]:
        may_go.wait(30)
        return locks(source)

    monkeypatch.setattr(Image, "close", lambda image, close=Image.close: (close(image), gone.set()))
    memory = ImageMemory("made", MIB, slowly)
    memory.close()  # returns although there is nothing yet
    may_go.set()
    assert gone.wait(30)
    assert images_open() == 0 and not locks.held


@pytest.mark.parametrize("guess", [0, MIB])
def test_memory_that_cannot_be_page_locked_is_told_when_it_matters(guess: int) -> None:
    def fail(source: memoryview) -> Callable[[], None]:
        raise VmmError("cannot page-lock")

    memory = ImageMemory("made", guess, fail)
    with pytest.raises(VmmError, match="page-lock"):
        memory.take(MIB)
    memory.close()
    assert images_open() == 0
