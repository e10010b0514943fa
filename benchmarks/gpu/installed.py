"""What this machine has to compare with: attention kernels, kvcached."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def attention_backend() -> str:
    """FA3 where its kernels are, else Triton; looked up without importing them."""
    spec = importlib.util.find_spec("sgl_kernel")
    places = list(spec.submodule_search_locations or []) if spec else []
    return "fa3" if any(list(Path(place).glob("flash_ops*.so")) for place in places) else "triton"


def find_kvcached() -> Path | None:
    """The site folder that holds kvcached and its hook, or None."""
    spec = importlib.util.find_spec("kvcached")
    if spec is None or not spec.origin:
        return None
    return Path(spec.origin).parent.parent


def kvcached_environment(folder: Path, name: str) -> dict[str, str] | None:
    """What a process needs in its environment to run with kvcached's hook; None if kvcached is not importable.

    Its hook is a .pth file, which Python reads in site folders only, not on PYTHONPATH.
    """
    site_folder = find_kvcached()
    if site_folder is None:
        return None
    hooks = folder / "sitecustomize"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(site_folder)!r})\n")
    return {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_AUTOPATCH": "1",
        "KVCACHED_IPC_NAME": f"pb_{os.getpid()}_{name}",
        "PYTHONPATH": os.pathsep.join([str(hooks), os.environ.get("PYTHONPATH", "")]),
    }
