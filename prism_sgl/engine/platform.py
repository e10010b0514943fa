"""SGLang on the CPU as an out-of-tree platform: torch's own attention, our pools.

The host device stands in for a GPU: the same pools, ledger, sleep and wake over memory that really maps and
unmaps, so that everything but the CUDA driver is tested where there is no card.
"""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform


class HostPlatform(CpuDeviceMixin, SRTPlatform):
    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"
