"""Memory for an image is made while the model loads, and given back where nobody takes it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from prism_sgl.allocator.image import Image
from prism_sgl.engine.image_client import ImageMemory
from prism_sgl.errors import VmmError

MIB = 1 << 20


def images_open() -> int:
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum("prism-image:unit" in link for link in links)


@pytest.mark.parametrize("guess", [0, MIB, 4 * MIB], ids=["no guess", "too little", "too much"])
def test_the_guess_is_cut_or_extended(guess: int) -> None:
    memory = ImageMemory("unit", guess)
    image = memory.take(2 * MIB)
    memory.close()
    status = os.fstat(image.fileno())
    assert (image.size_bytes, status.st_size, status.st_blocks * 512) == (2 * MIB, 2 * MIB, 2 * MIB)
    image.close()
    assert images_open() == 0


def test_closing_waits_for_nothing_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another runtime has made the image, a start must not wait for memory that it does not need."""
    may_go, gone = threading.Event(), threading.Event()
    create = Image.create

    def slowly(name: str, size_bytes: int) -> Image:
        may_go.wait(30)
        return create(name, size_bytes)

    monkeypatch.setattr(Image, "create", slowly)
    monkeypatch.setattr(Image, "close", lambda image, close=Image.close: (close(image), gone.set()))
    memory = ImageMemory("unit", MIB)
    memory.close()  # returns although there is nothing yet
    may_go.set()
    assert gone.wait(30)
    assert images_open() == 0


def test_a_host_without_memory_is_told_when_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, size_bytes: int) -> Image:
        raise VmmError("no host memory")

    monkeypatch.setattr(Image, "create", fail)
    memory = ImageMemory("unit", MIB)
    with pytest.raises(VmmError, match="no host memory"):
        memory.take(MIB)
    memory.close()
