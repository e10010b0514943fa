"""The image store in a loop of its own thread, asked by real processes and over real sockets."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_sgl import addresses
from prism_sgl.launch.image_store import ImageStore
from prism_sgl.messages import FindImage, ImageReply, OpenImage, SealImage, decode_image_reply, encode_json

MIB = 1 << 20
CAP = 8 * MIB


class RunningStore:
    """The store's loop runs in a thread, as the tests block on sockets."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self.lines: list[str] = []
        self.loop = asyncio.new_event_loop()
        self.used = {"chat"}
        self.store = ImageStore(run_dir, CAP, self.lines.append, lambda model: model in self.used)
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.call(self.store.start)

    def call(self, function: object) -> object:
        async def run() -> object:
            return function()  # type: ignore[operator]

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)

    def check(self) -> None:
        self.call(self.store.check)

    def end(self) -> None:
        self.call(self.store.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.settimeout(30)
        client.connect(addresses.image_store(self.run_dir))
        return client


@pytest.fixture
def store() -> Iterator[RunningStore]:
    with tempfile.TemporaryDirectory(prefix="prism-") as run_dir:
        running = RunningStore(run_dir)
        yield running
        running.check()
        running.end()
        assert not os.listdir(run_dir)


def send(client: socket.socket, key: str, size_bytes: int, name: str = "chat") -> None:
    client.send(encode_json(OpenImage(key=key, size_bytes=size_bytes, name=name)))


def receive(client: socket.socket) -> tuple[ImageReply, int]:
    frame, fds, _, _ = socket.recv_fds(client, 4096, 1)
    return decode_image_reply(frame), fds[0] if fds else -1


def ask(client: socket.socket, key: str, size_bytes: int) -> tuple[ImageReply, int]:
    send(client, key, size_bytes)
    return receive(client)


def memory_file(size_bytes: int, content: bytes = b"weights") -> int:
    fd = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(fd, 0, size_bytes)
    os.pwrite(fd, content, 0)
    return fd


def seal(client: socket.socket, key: str, fd: int) -> ImageReply:
    socket.send_fds(client, [encode_json(SealImage(key=key))], [fd])
    return receive(client)[0]


def write_image(store: RunningStore, key: str, size_bytes: int) -> None:
    with store.connect() as client:
        assert ask(client, key, size_bytes)[0].status == "new"
        fd = memory_file(size_bytes)
        assert seal(client, key, fd).status == "sealed"
        os.close(fd)


def is_waiting(store: RunningStore, key: str, num: int) -> bool:
    return len(store.store._images[key].waiting) == num


def test_first_asker_writes_and_the_second_gets_the_sealed_copy(store: RunningStore) -> None:
    write_image(store, "k", 2 * MIB)
    with store.connect() as client:
        reply, fd = ask(client, "k", 2 * MIB)
        assert reply.status == "ready"
        assert os.pread(fd, 7, 0) == b"weights"
        assert os.fstat(fd).st_size == 2 * MIB
        with pytest.raises(OSError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(OSError):
            os.ftruncate(fd, 0)
        with pytest.raises(OSError):
            mmap.mmap(fd, 2 * MIB)  # shared and writable
        os.close(fd)


def test_an_image_is_known_from_when_somebody_writes_it(store: RunningStore) -> None:
    """Who finds it so allocates no memory for another."""

    def find(source: str) -> str:
        with store.connect() as client:
            client.send(encode_json(FindImage(source=source)))
            return receive(client)[0].status

    assert find("files") == "unknown"
    with store.connect() as client:
        assert ask(client, "files-layout", 2 * MIB)[0].status == "new"
        assert (find("files"), find("file"), find("files-layout")) == ("known", "unknown", "unknown")
    write_image(store, "files-layout", 2 * MIB)
    assert find("files") == "known"


def test_a_file_with_holes_or_of_another_size_is_not_kept(store: RunningStore) -> None:
    with store.connect() as client:
        ask(client, "k", 2 * MIB)
        fd = os.memfd_create("holes", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 2 * MIB)
        assert "holes" in seal(client, "k", fd).reason
        os.ftruncate(fd, MIB)
        assert "has 1048576 bytes" in seal(client, "k", fd).reason
        client.send(encode_json(SealImage(key="k")))
        assert receive(client)[0].reason == "send the image's memfd along"
        os.close(fd)
        assert seal(client, "k", memory_file(2 * MIB)).status == "sealed"


def test_descriptors_that_nobody_keeps_are_closed(store: RunningStore) -> None:
    with store.connect() as client:
        fd = memory_file(MIB)
        assert seal(client, "unknown", fd).status == "refused"
        store.check()  # on the store's loop: what it did for the answer is done
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            assert seal(client, "unknown", fd).status == "refused"
        store.check()
        assert len(os.listdir("/proc/self/fd")) == before
        os.close(fd)


def test_asker_waits_while_another_writes(store: RunningStore) -> None:
    with store.connect() as writer, store.connect() as reader:
        ask(writer, "k", MIB)
        send(reader, "k", MIB)
        # A second connection's answer shows that the store has read what was sent before it.
        assert ask(store.connect(), "other", 0)[0].status == "refused"
        assert store.call(lambda: is_waiting(store, "k", 1))
        assert seal(writer, "k", memory_file(MIB)).status == "sealed"
        reply, fd = receive(reader)
        assert reply.status == "ready"
        os.close(fd)


def test_killed_writer_is_followed_by_the_one_who_waits(store: RunningStore) -> None:
    code = (
        "import socket, sys\n"
        "from prism_sgl.messages import OpenImage, encode_json\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1])\n"
        "s.send(encode_json(OpenImage(key='k', size_bytes=1 << 20, name='chat')))\n"
        "s.recv(4096); print('writing', flush=True); sys.stdin.read()\n"
    )
    address = addresses.image_store(store.run_dir)
    with subprocess.Popen(
        [sys.executable, "-c", code, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        with store.connect() as heir:
            send(heir, "k", MIB)
            writer.send_signal(signal.SIGKILL)
            assert receive(heir)[0].status == "new"
            assert seal(heir, "k", memory_file(MIB)).status == "sealed"
    assert any("its writer has gone" in line for line in store.lines)


def test_image_that_an_heir_writes_is_the_heirs(store: RunningStore) -> None:
    """Two models of the same weights: who went without having written it does not use it, who waited does."""
    with store.connect() as heir:
        with store.connect() as writer:
            ask(writer, "k", MIB)
            send(heir, "k", MIB, name="code")
            assert ask(store.connect(), "other", 0)[0].status == "refused"
            assert store.call(lambda: is_waiting(store, "k", 1))
        assert receive(heir)[0].status == "new"
        assert seal(heir, "k", memory_file(MIB)).status == "sealed"
    assert any(line.startswith("images: code sealed") for line in store.lines)
    store.used = {"code"}
    with store.connect() as client:
        assert ask(client, "large", CAP)[0].status == "refused"
        store.used = {"chat"}
        assert ask(client, "large", CAP)[0].status == "new"


def test_a_maker_that_keeps_its_mapping_lets_nobody_else_write(store: RunningStore) -> None:
    """It has page-locked that mapping, and makes it read-only by itself (allocator/image.py)."""
    with store.connect() as client, store.connect() as other:
        ask(client, "k", MIB)
        fd = memory_file(MIB)
        with mmap.mmap(fd, MIB):
            assert seal(client, "k", fd).status == "sealed"
            reply, theirs = ask(other, "k", MIB)
            assert reply.status == "ready"
            with pytest.raises(OSError):
                mmap.mmap(theirs, MIB)
            with pytest.raises(OSError):
                os.pwrite(theirs, b"x", 0)
            os.close(theirs)
        os.close(fd)


def test_what_cannot_be_sealed_is_refused(store: RunningStore) -> None:
    with store.connect() as client:
        ask(client, "k", MIB)
        fd = os.memfd_create("image", os.MFD_CLOEXEC)  # allows no seals
        os.posix_fallocate(fd, 0, MIB)
        reply = seal(client, "k", fd)
        assert (reply.status, "cannot be sealed" in reply.reason) == ("refused", True)
        os.close(fd)


def test_other_size_of_a_known_key_is_refused(store: RunningStore) -> None:
    write_image(store, "k", MIB)
    with store.connect() as client:
        reply, _ = ask(client, "k", 2 * MIB)
        assert reply == ImageReply(status="refused", reason=f"the image has {MIB} bytes, not {2 * MIB}")


def test_cap_counts_sealed_and_unsealed_images(store: RunningStore) -> None:
    write_image(store, "a", 4 * MIB)
    with store.connect() as client:
        assert ask(client, "b", 3 * MIB)[0].status == "new"
        reply, _ = ask(client, "c", 2 * MIB)
        assert reply.status == "refused"
        assert (
            reply.reason
            == "host_cache is full: 2MiB asked for, 1MiB of 8MiB free; raise host_cache in [memory]"
        )
    with store.connect() as client:  # the unsealed one was dropped with its connection
        assert ask(client, "c", 4 * MIB)[0].status == "new"


def test_images_that_no_runtime_uses_make_room_oldest_first(store: RunningStore) -> None:
    for key in "abc":
        write_image(store, key, 2 * MIB)
    with store.connect() as client:
        fd = ask(client, "a", 2 * MIB)[1]  # asked for again: b is the oldest now
        assert ask(client, "d", 4 * MIB)[0].status == "refused", "all are in use"
        store.used.clear()
        assert ask(client, "d", 9 * MIB)[0].status == "refused", "nothing is dropped in vain"
        assert ask(client, "d", 4 * MIB)[0].status == "new"
        assert os.pread(fd, 7, 0) == b"weights", "who has it mapped keeps it"
        os.close(fd)
        assert list(store.store._images) == ["c", "a", "d"]
    assert [line for line in store.lines if "dropped," in line] == [
        "images: chat dropped, 2MiB: host_cache is full"
    ]


def test_only_the_writer_can_seal(store: RunningStore) -> None:
    with store.connect() as writer, store.connect() as other:
        ask(writer, "k", MIB)
        assert seal(other, "k", memory_file(MIB)).reason == "not the writer of this image"
        assert seal(writer, "unknown", memory_file(MIB)).reason == "not the writer of this image"
        assert seal(writer, "k", memory_file(MIB)).status == "sealed"


def test_undecodable_frame_ends_only_its_connection(store: RunningStore) -> None:
    with store.connect() as bad, store.connect() as good:
        bad.send(b"{]")
        assert bad.recv(100) == b""
        assert ask(good, "k", MIB)[0].status == "new"
    assert store.store.num_undecodable == 1


def test_socket_is_private(store: RunningStore) -> None:
    assert Path(addresses.image_store(store.run_dir)).stat().st_mode & 0o777 == 0o600
