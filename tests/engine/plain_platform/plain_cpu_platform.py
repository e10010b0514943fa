from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform


class PlainPlatform(CpuDeviceMixin, SRTPlatform):
    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self):
        return "torch_native"

    def get_dispatch_key_name(self):
        return "native"

    def get_mha_kv_pool_cls(self):
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self):
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

        def build(size, page_size, dtype, device, kvcache, need_sort):
            return TokenToKVPoolAllocator(size, dtype, device, kvcache, need_sort)

        return build
