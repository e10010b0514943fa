"""A runtime's side of the image store: get the memfd of its weights, or bring one that is filled, to be sealed.

The store lives in the supervisor (launch/image_store.py), so that an image outlives runtimes and is held once
for all runtimes of the same weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from prism_sgl import addresses, messages
from prism_sgl.allocator.image import Image, PageLock
from prism_sgl.errors import PrismError, VmmError
from prism_sgl.messages import FindImage, ImageReply, OpenImage, SealImage

log = logging.getLogger(__name__)

_REPLY_BYTES = 4096


class ImageRefusedError(PrismError):
    """The store has no room for this image, or another of this key."""


def image_source(path: str, *, dtype: str, quantization: str | None, rank: int) -> str:
    """Names what an image is made from, not the model's name. Known before the model loads."""
    digest = hashlib.sha256()
    folder = Path(path)
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if file.suffix in {".safetensors", ".bin", ".pt", ".gguf", ".json"} and file.is_file():
                status = file.stat()
                digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    else:
        digest.update(path.encode())
    digest.update(f"{dtype} {quantization} {rank}".encode())
    return digest.hexdigest()


def image_key(source: str, sizes_bytes: Sequence[int]) -> str:
    """Names the bytes of an image: its source, and the layout that its storages make."""
    return f"{source}-{hashlib.sha256(str(list(sizes_bytes)).encode()).hexdigest()}"


def is_image_known(run_dir: str, source: str) -> bool:
    """The store has an image of this source, or somebody is writing one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as store:
        store.connect(addresses.image_store(run_dir))
        store.send(messages.encode_json(FindImage(source=source)))
        return _accepted(store.recv(_REPLY_BYTES), source).status == "known"


class ImageMemory:
    """Host memory for an image that nobody may have yet, allocated and page-locked in a thread while the model loads.

    For a large model that takes seconds (docs/benchmarks.md), which nobody then waits for. ``size_bytes`` is a guess;
    if it was wrong, the image is cut or extended and page-locked again.
    """

    def __init__(self, name: str, size_bytes: int, page_lock: PageLock) -> None:
        self._name = name
        self._page_lock = page_lock
        self._allocation: Future[Image | None] = Future()
        threading.Thread(target=self._allocate, args=(size_bytes,), name="image memory", daemon=True).start()

    def take(self, size_bytes: int) -> Image:
        """Once. Raises VmmError: the host has no memory for it, or cannot page-lock it."""
        image = self._allocation.result()
        if image is None:
            return Image.create(self._name, size_bytes, self._page_lock)
        self._allocation = Future()  # it is the caller's now
        image.resize(size_bytes, self._page_lock)
        return image

    def close(self) -> None:
        """Give back what nobody has taken, as soon as the kernel has made it: the start does not wait for that."""
        self._allocation.add_done_callback(_close_image)

    def _allocate(self, size_bytes: int) -> None:
        image = None
        if size_bytes > 0:
            locked_s = 0.0

            def page_lock(view: memoryview) -> Callable[[], None]:
                nonlocal locked_s
                began = time.perf_counter()
                unlock = self._page_lock(view)
                locked_s = time.perf_counter() - began
                return unlock

            began = time.perf_counter()
            with contextlib.suppress(VmmError):  # it is said when it is needed, and perhaps it is not
                image = Image.create(self._name, size_bytes, page_lock)
                log.info(
                    "image memory: %d MiB made in %.2f s, page-locked in %.2f s",
                    size_bytes >> 20,
                    time.perf_counter() - began - locked_s,
                    locked_s,
                )
        self._allocation.set_result(image)


def _close_image(allocation: Future[Image | None]) -> None:
    image = allocation.result()
    if image is not None:
        image.close()


def fetch_image(
    run_dir: str,
    key: str,
    size_bytes: int,
    name: str,
    memory: ImageMemory,
    fill: Callable[[memoryview], None],
) -> Image:
    """The sealed image of ``key``; in ``memory`` and written by ``fill`` if we are the first to ask.

    Blocks while another runtime is writing the same image.

    Raises:
        ImageRefusedError: the host memory cap is reached.
        VmmError: the host has no memory.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as store:
        store.connect(addresses.image_store(run_dir))
        store.send(messages.encode_json(OpenImage(key=key, size_bytes=size_bytes, name=name)))
        data, fds, _, _ = socket.recv_fds(store, _REPLY_BYTES, 1)
        if _accepted(data, name).status == "ready":
            return Image.from_fd(fds[0], size_bytes)
        image = memory.take(size_bytes)
        with image.writable_view() as view:
            fill(view)
        image.seal()
        socket.send_fds(store, [messages.encode_json(SealImage(key=key))], [image.fileno()])
        _accepted(store.recv(_REPLY_BYTES), name)
        return image


def _accepted(data: bytes, name: str) -> ImageReply:
    if not data:
        raise ImageRefusedError(f"{name}: the image store closed the connection")
    reply = messages.decode_image_reply(data)
    if reply.status == "refused":
        raise ImageRefusedError(f"{name}: no image of the weights: {reply.reason}")
    return reply
