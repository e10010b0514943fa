"""SGLang on the CPU as an out-of-tree platform: torch's own attention, our pools (facts section 8).

The host device stands in for a GPU: the same pools, ledger, sleep and wake over memory that really maps and
unmaps, so that everything but the CUDA driver is tested where there is no card.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform

from prism_sgl.errors import UnsupportedModelError


class HostPlatform(CpuDeviceMixin, SRTPlatform):
    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_mha_kv_pool_cls(self) -> type[Any]:
        from prism_sgl.engine.kv_pool import TokenMajorKVPool

        return TokenMajorKVPool

    def get_mla_kv_pool_cls(self) -> type[Any]:
        raise UnsupportedModelError(
            "this model has multi-head latent attention (MLA), which has no elastic pool yet; "
            "serve a model with MHA or GQA attention"
        )

    def get_dsa_kv_pool_cls(self) -> type[Any]:
        raise UnsupportedModelError(
            "this model has sparse attention (DSA), which has no elastic pool yet; "
            "serve a model with MHA or GQA attention"
        )

    def get_paged_allocator_cls(self) -> Any:
        from prism_sgl.engine.slots import build_allocator

        return build_allocator
