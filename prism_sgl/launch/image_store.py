"""Weight images of all models, held open by the supervisor so that they outlive the runtimes.

An image is a memfd. The first who asks for a key brings it, filled and sealed; everybody after that maps the same
memory. Its memory is the writer's to allocate, while it loads: here is only counted.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from prism_sgl import addresses, machine, memfd
from prism_sgl.messages import (
    DECODE_ERRORS,
    FindImage,
    ImageReply,
    OpenImage,
    SealImage,
    decode_image_request,
    encode_json,
)
from prism_sgl.units import show_size

_MAX_FRAME_BYTES = 1 << 16
_MAX_FDS = 4
_BLOCK_BYTES = 512  # the unit of st_blocks


class _Peer:
    """One connection. ``fd`` is its identity: dead peers are dropped before their number can come again."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.alive = True

    def send(self, reply: ImageReply, fds: list[int]) -> bool:
        """False: the peer has gone or does not read."""
        if not self.alive:
            return False
        try:
            socket.send_fds(self.connection, [encode_json(reply)], fds)
        except OSError:
            return False
        return True


class _Image:
    """Written by ``writer``, then sealed: from then on it has a descriptor and no writer."""

    def __init__(self, key: str, name: str, size_bytes: int, writer: _Peer) -> None:
        self.key = key
        self.name = name
        self.models = {name}  # those of the same weights share it
        self.size_bytes = size_bytes
        self.writer: _Peer | None = writer
        self.waiting: dict[_Peer, str] = {}  # each with the model that it loads
        self.fd: int | None = None

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)


class ImageStore:
    """Invariant: the sizes of all images, counted before they are written, never exceed ``cap_bytes``.

    Where they would, images that no runtime uses are dropped, the one that was not asked for longest first; their
    models load from their files again when they are wanted.
    """

    def __init__(
        self, run_dir: str, cap_bytes: int, log: Callable[[str], None], in_use: Callable[[str], bool]
    ) -> None:
        """``in_use``: whether the model of this name has a runtime, whose memory dropping its image would not free."""
        self.cap_bytes = cap_bytes or machine.memory_bytes() // 2
        self._in_use = in_use
        self.num_undecodable = 0
        self._path = Path(addresses.image_store(run_dir))
        self._log = log
        self._images: dict[str, _Image] = {}
        self._peers: set[_Peer] = set()
        self._listener: socket.socket | None = None

    def start(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(str(self._path))
        self._path.chmod(0o600)
        self._listener.listen(64)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Drop all images: their memory comes back when the last runtime has unmapped them."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)
        for peer in list(self._peers):
            self._close_peer(peer)
        for image in self._images.values():
            image.close()
        self._images.clear()

    def held_bytes(self) -> int:
        return sum(image.size_bytes for image in self._images.values())

    def check(self) -> None:
        assert self.held_bytes() <= self.cap_bytes
        for key, image in self._images.items():
            assert image.key == key
            assert (image.writer is None) == (image.fd is not None)
            assert not (image.waiting and image.writer is None)
            assert image.writer not in image.waiting
            assert all(peer in self._peers for peer in image.waiting)

    # ------------------------------------------------------------ connections

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", credentials)
        if uid != os.getuid():
            self._log(f"images: refused a connection of user {uid}")
            connection.close()
            return
        connection.setblocking(False)
        peer = _Peer(connection)
        self._peers.add(peer)
        asyncio.get_running_loop().add_reader(connection, self._receive, peer)

    def _receive(self, peer: _Peer) -> None:
        try:
            frame, fds, _, _ = socket.recv_fds(peer.connection, _MAX_FRAME_BYTES, _MAX_FDS)
        except BlockingIOError:
            return
        except OSError:
            frame, fds = b"", []
        try:
            self._obey(peer, frame, fds)
        finally:
            for fd in fds:  # what nobody has kept
                os.close(fd)

    def _obey(self, peer: _Peer, frame: bytes, fds: list[int]) -> None:
        if not frame:
            self._drop_peer(peer)
            return
        try:
            request = decode_image_request(frame)
        except DECODE_ERRORS:
            self.num_undecodable += 1
            self._drop_peer(peer)
            return
        match request:
            case FindImage():
                is_known = any(key.startswith(f"{request.source}-") for key in self._images)
                self._reply(peer, ImageReply(status="known" if is_known else "unknown"), [])
            case OpenImage():
                self._open(peer, request)
            case SealImage():
                self._seal(peer, request.key, fds)

    def _drop_peer(self, peer: _Peer) -> None:
        """It closed: what it was writing is dropped, and whoever waits for that writes it anew."""
        self._close_peer(peer)
        for image in list(self._images.values()):
            if peer in image.waiting:
                del image.waiting[peer]
            elif image.writer is peer:
                self._abandon(image, "its writer has gone")

    def _close_peer(self, peer: _Peer) -> None:
        if peer.alive:
            peer.alive = False
            asyncio.get_running_loop().remove_reader(peer.connection)
            peer.connection.close()
            self._peers.discard(peer)

    # ------------------------------------------------------------ images

    def _open(self, peer: _Peer, request: OpenImage) -> None:
        image = self._images.get(request.key)
        if image is None:
            self._create(peer, request)
        elif image.size_bytes != request.size_bytes:
            self._refuse(peer, f"the image has {image.size_bytes} bytes, not {request.size_bytes}")
        elif image.fd is not None:
            image.models.add(request.name)
            self._images[image.key] = self._images.pop(
                image.key
            )  # in the order in which they were last asked for
            self._reply(peer, ImageReply(status="ready"), [image.fd])
        elif image.writer is peer or peer in image.waiting:
            self._refuse(peer, "asked for already on this connection")
        else:
            image.models.add(request.name)
            image.waiting[peer] = request.name

    def _create(self, peer: _Peer, request: OpenImage) -> None:
        if request.size_bytes <= 0:
            self._refuse(peer, f"an image cannot have {request.size_bytes} bytes")
            return
        free = self._make_room(request.size_bytes)
        if request.size_bytes > free:
            self._refuse(
                peer,
                f"host_cache is full: {show_size(request.size_bytes)} asked for, {show_size(free)} of "
                f"{show_size(self.cap_bytes)} free; raise host_cache in [memory]",
            )
            return
        self._images[request.key] = _Image(request.key, request.name, request.size_bytes, peer)
        self._reply(peer, ImageReply(status="new"), [])

    def _make_room(self, size_bytes: int) -> int:
        """Bytes that are free now, if need be after images that nobody uses have gone."""
        unused = [
            i for i in self._images.values() if i.writer is None and not any(map(self._in_use, i.models))
        ]
        missing = size_bytes - (self.cap_bytes - self.held_bytes())
        if missing <= sum(image.size_bytes for image in unused):
            for image in unused:
                if missing <= 0:
                    break
                missing -= image.size_bytes
                self._remove(image)
                self._log(f"images: {image.name} dropped, {show_size(image.size_bytes)}: host_cache is full")
        return self.cap_bytes - self.held_bytes()

    def _seal(self, peer: _Peer, key: str, fds: list[int]) -> None:
        """Keep what the writer brings, if nobody can change it any more."""
        image = self._images.get(key)
        if image is None or image.writer is not peer:
            self._refuse(peer, "not the writer of this image")
            return
        if len(fds) != 1:
            self._refuse(peer, "send the image's memfd along")
            return
        fd = fds.pop()
        if reason := _unfit(fd, image.size_bytes):
            os.close(fd)
            self._refuse(peer, reason)
            return
        image.fd = fd
        image.writer = None
        waiting, image.waiting = image.waiting, {}
        self._log(
            f"images: {image.name} sealed, {show_size(image.size_bytes)} (all {show_size(self.held_bytes())})"
        )
        self._reply(peer, ImageReply(status="sealed"), [])
        for other in waiting:
            self._reply(other, ImageReply(status="ready"), [fd])

    def _abandon(self, image: _Image, reason: str) -> None:
        self._remove(image)
        self._log(f"images: {image.name} dropped before it was sealed ({reason})")
        waiting = [(peer, name) for peer, name in image.waiting.items() if peer.alive]
        for peer, name in waiting:
            self._open(peer, OpenImage(key=image.key, size_bytes=image.size_bytes, name=name))

    def _remove(self, image: _Image) -> None:
        del self._images[image.key]
        image.close()

    def _refuse(self, peer: _Peer, reason: str) -> None:
        self._reply(peer, ImageReply(status="refused", reason=reason), [])

    def _reply(self, peer: _Peer, reply: ImageReply, fds: list[int]) -> None:
        if not peer.send(reply, fds):
            self._drop_peer(peer)


def _unfit(fd: int, size_bytes: int) -> str | None:
    """Why this file cannot be kept as an image; else it is sealed."""
    status = os.fstat(fd)
    if status.st_size != size_bytes:
        return f"the memfd has {status.st_size} bytes, not {size_bytes}"
    if status.st_blocks * _BLOCK_BYTES < size_bytes:
        return "the memfd has holes: a reader that fills one when memory has run out dies of SIGBUS"
    try:
        memfd.seal(fd)
    except OSError as error:
        return f"cannot be sealed ({error.strerror})"
    return None
