"""The places where we reach into SGLang are as we know them; a missing hook ends the process."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
from prism_sgl.engine import spec
spec.announce_device_kind("host")
import sglang.srt.managers.scheduler
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.platforms import current_platform
from prism_sgl.engine import seams
from prism_sgl.errors import SeamError
load_plugins()
seams.prove_hooks()
print("platform", type(current_platform).__name__)
hooked = next(s for s in seams.SEAMS if s.target.endswith("get_next_batch_to_run"))
seam = hooked.target
HookRegistry._patched.discard(seam)
try:
    seams.prove_hooks()
except SeamError as error:
    print("refused", seam in str(error))
seams.SEAMS = (seams.Seam(seam, hooked.kind, hooked.hook, ("self", "other")),)
try:
    seams.check_signatures()
except SeamError as error:
    print("changed", "get_next_batch_to_run takes" in str(error))
"""


def test_every_hook_attaches_and_a_lost_one_is_found() -> None:
    """In a process of its own, because hooks stay attached."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PRISM_", "SGLANG_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.stdout.splitlines() == ["platform HostPlatform", "refused True", "changed True"], done.stderr[
        -3000:
    ]
