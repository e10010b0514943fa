"""A host device that fails when a test says so. Python imports this in every process that has the folder in its path.

``FAILING_DEVICE`` is the path of a file. While it is there, maps fail for the model whose name it holds.
"""

import errno
import os
from pathlib import Path

from prism_sgl.allocator.host_calls import HostCalls

_flag = Path(os.environ["FAILING_DEVICE"])
_really_map = HostCalls.map


def _map_unless_told(self, address, size_bytes, fd, offset, **options):
    if _flag.exists() and f"prism:{_flag.read_text()}@" in os.readlink(f"/proc/self/fd/{fd}"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    _really_map(self, address, size_bytes, fd, offset, **options)


HostCalls.map = _map_unless_told
