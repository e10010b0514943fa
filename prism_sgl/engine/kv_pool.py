"""The KV cache of one runtime, token-major on an elastic arena.

Layout ``[rows, layers, K row | V row]``: all layers of a token lie side by side, so that one page of the arena
holds all layers of a run of tokens and one map call serves every layer (design.md, Memory; measured equal to
SGLang's own layout under FA3 and Triton, gpu/README.md). Each layer is a strided 3-D view ``[rows, heads, dim]``
with ``stride(0) = entry``; SGLang's readers and writers take it as it is (facts section 2.3).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, move_kv_cache_native

from prism_sgl.allocator.elastic_pool import ElasticPool
from prism_sgl.engine.runtime_memory import RuntimeMemory
from prism_sgl.errors import UnsupportedModelError


class TokenMajorKVPool(MHATokenToKVPool):
    """``MHATokenToKVPool`` (srt/mem_cache/memory_pool.py:1740) whose buffers are views of an elastic arena.

    Rows ``0 .. page_size-1`` are SGLang's padding sink: their page is mapped for as long as the runtime is awake.
    """

    elastic: ElasticPool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("quant_method") is not None:
            raise UnsupportedModelError("a 4-bit KV cache has no elastic pool yet; drop kv_cache_dtype")
        kwargs["post_capture_active"] = False
        super().__init__(*args, **kwargs)

    def _create_buffers(self) -> None:
        if self.use_hnd or self.kv_cache_layout != "nhd":
            raise UnsupportedModelError(
                f"KV layout {self.kv_cache_layout} has no elastic pool; use the default"
            )
        k_width, v_width = self.head_num * self.head_dim, self.head_num * self.v_head_dim
        rows = self.size + self.page_size
        entry_bytes = self.layer_num * (k_width + v_width) * self.store_dtype.itemsize
        memory = RuntimeMemory.current()
        self.elastic = memory.open_kv(
            block_bytes=entry_bytes * self.page_size, num_blocks=math.ceil(rows / self.page_size)
        )
        raw = memory.device.bytes_at(self.elastic.vmm.base, rows * entry_bytes).view(self.store_dtype)
        entries = raw.view(rows, self.layer_num, k_width + v_width)
        self.k_buffer = [
            entries[:, layer, :k_width].unflatten(-1, (self.head_num, self.head_dim))
            for layer in range(self.layer_num)
        ]
        self.v_buffer = [
            entries[:, layer, k_width:].unflatten(-1, (self.head_num, self.v_head_dim))
            for layer in range(self.layer_num)
        ]
        self.k_scale_buffer = self.v_scale_buffer = None
        self.dq_k_buffer = self.dq_v_buffer = None
        self._kv_buffer_descs = self._build_kv_buffer_descs()
        self._init_data_ptrs_and_strides()

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """(K bytes, V bytes) that are really mapped now, not the reserved range."""
        mapped = self.elastic.mapped_bytes
        k_bytes = mapped * self.head_dim // (self.head_dim + self.v_head_dim)
        return k_bytes, mapped - k_bytes

    def _move_kv_cache_impl(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        # SGLang's tiled copy takes the row size for the stride (memory_pool.py:2775): wrong for strided views.
        move_kv_cache_native(self.k_buffer, self.v_buffer, tgt_loc, src_loc)

    def get_contiguous_buf_infos(self) -> Any:
        raise UnsupportedModelError("prefill/decode disaggregation cannot register an elastic KV cache yet")
