"""Build, on a machine without a card, what the GPU tests and benchmarks want and a card's machine may not make itself.

    .venv/bin/python scripts/build_gpu_peers.py [--out .gpu] [--cuda /usr/local/cuda] [--only kvcached|flashinfer]

- ``OUT/kvcached``: kvcached 0.1.6, a peer of benchmarks/gpu (add the folder to PYTHONPATH); a minute. Its own build
  does not name libcuda, so that its extension loads and then dies at the first driver call.
- ``OUT/flashinfer/aot.tar.xz``: flashinfer's kernels for the 1B of tests/gpu on Hopper (bf16, heads of 64), which it
  would compile when it first needs them; unpack it in the folder that holds ``flashinfer``; ten minutes of two cores.

Needs gcc, uv (``pip install uv``), and a CUDA toolkit no newer than the driver that will load the kernels.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

KVCACHED = ("kvcached==0.1.6", "posix_ipc==1.3.2", "wrapt==2.5.2")
SITE = Path(sysconfig.get_paths()["purelib"])
# Headers that a minimal toolkit lacks; torch's own packages bring them.
LENT_HEADERS = ("curand*", "cublas*", "cusparse*", "cusolver*")
# SGLang prefills behind a cached prefix and decodes with fa2, prefills without one with what flashinfer chooses (fa3 on
# Hopper), and merges both (srt/layers/attention/flashinfer_backend.py).
BUILD_KERNELS = """
import torch
from flashinfer.jit.attention import gen_batch_decode_module, gen_batch_prefill_module
from flashinfer.jit.cascade import gen_cascade_module
from flashinfer.jit.core import build_jit_specs

types, heads = (torch.bfloat16,) * 3 + (torch.int32,), (64, 64)
build_jit_specs(
    [gen_batch_prefill_module(b, *types, *heads, 0, False, False, False) for b in ("fa2", "fa3")]
    + [gen_batch_decode_module(*types, *heads, 0, False, False), gen_cascade_module()],
    verbose=False,
)
"""


def build_kvcached(out: Path, scratch: Path, environment: Mapping[str, str]) -> None:
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("uv is not on PATH; install it (pip install uv) and run this again")
    target = out / "kvcached"
    shutil.rmtree(target, ignore_errors=True)
    options = f"--python {sys.executable} --target {target} --no-deps --no-build-isolation-package kvcached"
    run(
        [uv, "pip", "install", *options.split(), *KVCACHED],
        dict(environment) | {"LDFLAGS": "-Wl,--no-as-needed -lcuda"},
    )
    (extension,) = (target / "kvcached").glob("_C*.so")
    needed = subprocess.run(["readelf", "-d", extension], check=True, capture_output=True, text=True).stdout
    if "libcuda.so.1" not in needed:
        sys.exit(f"{extension} does not name libcuda.so.1: it would die at its first driver call")


def build_kernels(out: Path, scratch: Path, environment: Mapping[str, str]) -> None:
    workspace = scratch / "flashinfer"
    run(
        [sys.executable, "-c", BUILD_KERNELS],
        dict(environment)
        | {
            "FLASHINFER_WORKSPACE_BASE": str(workspace),
            "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
            "FLASHINFER_EXTRA_LDFLAGS": f"-L{environment['LIBRARY_PATH']}",
        },
    )
    stage = scratch / "stage"
    built = [path for path in workspace.rglob("*.so") if path.stem == path.parent.name]
    for path in built:
        kept = stage / "flashinfer/data/aot" / path.stem / path.name
        kept.parent.mkdir(parents=True)
        run(["strip", "--strip-unneeded", "-o", str(kept), str(path)], environment)
    archive = out / "flashinfer/aot.tar.xz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    run(["tar", "-C", str(stage), "-cJf", str(archive), "flashinfer"], environment)
    print(f"{archive}: {len(built)} modules, {archive.stat().st_size / 1e6:.1f} MB")


def compiler_environment(scratch: Path, cuda: Path) -> dict[str, str]:
    """The toolkit, the headers that it lacks, and a libcuda to link with: the real one comes with the driver."""
    nvcc = cuda / "bin/nvcc"
    if not nvcc.exists():
        sys.exit(f"{nvcc} is missing; name a CUDA toolkit: --cuda /usr/local/cuda-13.0")
    headers, stubs = scratch / "include", scratch / "stubs"
    headers.mkdir()
    stubs.mkdir()
    for pattern in LENT_HEADERS:
        for header in (SITE / "nvidia/cu13/include").glob(pattern):
            (headers / header.name).symlink_to(header)
    options = "-shared -fPIC -x c /dev/null -Wl,-soname,libcuda.so.1 -o"
    run(["gcc", *options.split(), str(stubs / "libcuda.so")], os.environ)
    return dict(os.environ) | {
        "CUDA_HOME": str(cuda),
        "CPATH": str(headers),
        "LIBRARY_PATH": str(stubs),
        "MAX_JOBS": str(os.cpu_count()),
    }


def run(command: list[str], environment: Mapping[str, str]) -> None:
    if subprocess.run(command, env=environment).returncode:
        sys.exit(f"failed: {' '.join(command)[:200]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".gpu"))
    parser.add_argument("--cuda", type=Path, default=Path("/usr/local/cuda"))
    builders = {"kvcached": build_kvcached, "flashinfer": build_kernels}
    parser.add_argument("--only", choices=builders)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        environment = compiler_environment(scratch, args.cuda)
        for name, build in builders.items():
            if args.only in (None, name):
                began = time.monotonic()
                print(f"{name}: building ...", flush=True)
                build(args.out.resolve(), scratch, environment)
                print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
