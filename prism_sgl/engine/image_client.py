"""A runtime's side of the image store: get the memfd of its weights, fill it if nobody has, have it sealed.

The store lives in the supervisor (launch/image_store.py), so that an image outlives runtimes and is held once
for all runtimes of the same weights.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from prism_sgl import addresses, messages
from prism_sgl.allocator.weights import Image
from prism_sgl.errors import PrismError
from prism_sgl.messages import ImageReply, OpenImage, SealImage

_REPLY_BYTES = 4096


class ImageRefusedError(PrismError):
    """The store has no room for this image, or another of this key."""


def image_key(
    path: str, *, dtype: str, quantization: str | None, rank: int, sizes_bytes: Sequence[int]
) -> str:
    """Names the bytes of an image: weights, dtype, quantisation, rank and layout, not the model's name."""
    digest = hashlib.sha256()
    folder = Path(path)
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if file.suffix in {".safetensors", ".bin", ".pt", ".gguf", ".json"} and file.is_file():
                status = file.stat()
                digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    else:
        digest.update(path.encode())
    digest.update(f"{dtype} {quantization} {rank} {list(sizes_bytes)}".encode())
    return digest.hexdigest()


def fetch_image(
    run_dir: str, key: str, size_bytes: int, name: str, fill: Callable[[memoryview], None]
) -> Image:
    """The sealed image of ``key``; ``fill`` writes it if we are the first to ask.

    Blocks while another runtime is writing the same image.

    Raises:
        ImageRefusedError: the host memory cap is reached, or the host has no memory.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as store:
        store.connect(addresses.image_store(run_dir))
        store.send(messages.encode_json(OpenImage(key=key, size_bytes=size_bytes, name=name)))
        data, fds, _, _ = socket.recv_fds(store, _REPLY_BYTES, 1)
        reply = _accepted(data, name)
        image = Image.from_fd(fds[0], size_bytes)
        if reply.status == "new":
            # The view must be gone before the seal: the kernel refuses to seal a memfd that can be written.
            with image.writable_view() as view:
                fill(view)
            store.send(messages.encode_json(SealImage(key=key)))
            _accepted(store.recv(_REPLY_BYTES), name)
        return image


def _accepted(data: bytes, name: str) -> ImageReply:
    if not data:
        raise ImageRefusedError(f"{name}: the image store closed the connection")
    reply = messages.decode_image_reply(data)
    if reply.status == "refused":
        raise ImageRefusedError(f"{name}: no image of the weights: {reply.reason}")
    return reply
