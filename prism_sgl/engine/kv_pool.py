"""The KV cache of one runtime: SGLang's own MHA pool, its buffers views of an elastic arena."""

from __future__ import annotations

import math
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, move_kv_cache_native

from prism_sgl.allocator.elastic_pool import ElasticPool
from prism_sgl.engine.kv_layout import MAX_ROWS, KvLayout
from prism_sgl.engine.runtime_memory import RuntimeMemory
from prism_sgl.errors import UnsupportedModelError


class ElasticKVPool(MHATokenToKVPool):
    """``MHATokenToKVPool`` (srt/mem_cache/memory_pool.py:1740) in the layout of kv_layout.py.

    ``size`` is the range of slot numbers, not the number of tokens: SGLang tests numbers against it. Rows
    ``0 .. page_size-1`` are its padding sink: their page is mapped for as long as the runtime is awake.
    """

    size: int
    elastic: ElasticPool
    layout: KvLayout

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("quant_method") is not None:
            raise UnsupportedModelError(
                f"{_model()}: a 4-bit KV cache has no elastic pool yet; drop engine_args.kv_cache_dtype"
            )
        kwargs["post_capture_active"] = False
        super().__init__(*args, **kwargs)

    def _create_buffers(self) -> None:
        if self.use_hnd or self.kv_cache_layout != "nhd":
            raise UnsupportedModelError(
                f"{_model()}: KV layout {self.kv_cache_layout} has no elastic pool; use the default"
            )
        if self.head_dim != self.v_head_dim:
            raise UnsupportedModelError(
                f"{_model()}: heads of {self.head_dim} for K and {self.v_head_dim} for V have no elastic pool "
                "yet; serve a model whose heads are of one width"
            )
        memory = RuntimeMemory.current()
        self.layout = KvLayout.plan(
            layers=self.layer_num,
            row_bytes=self.head_num * self.head_dim * self.store_dtype.itemsize,
            block_tokens=self.page_size,
            page_bytes=memory.spec.kv_page_bytes,
        )
        num_blocks = math.ceil((self.size + self.page_size) / self.page_size)
        rows = self.layout.num_rows(num_blocks)
        if rows > MAX_ROWS:
            raise UnsupportedModelError(
                f"{_model()}: {self.size} tokens of KV in rows of {self.layout.row_bytes} bytes need slot "
                f"numbers up to {rows}, and SGLang's go up to {MAX_ROWS}; lower max_kv"
            )
        self.elastic = memory.open_kv(self.layout.page, num_blocks)
        self.size = rows - self.page_size
        self.k_buffer = [self._plane(memory, 2 * layer, rows) for layer in range(self.layer_num)]
        self.v_buffer = [self._plane(memory, 2 * layer + 1, rows) for layer in range(self.layer_num)]
        self.k_scale_buffer = self.v_scale_buffer = None
        self.dq_k_buffer = self.dq_v_buffer = None
        self._kv_buffer_descs = self._build_kv_buffer_descs()
        self._init_data_ptrs_and_strides()

    def _plane(self, memory: RuntimeMemory, plane: int, rows: int) -> torch.Tensor:
        """``[rows, heads, dim]`` from this plane of page 0 on."""
        row_bytes = self.layout.row_bytes
        first_byte = plane * self.layout.plane_rows * row_bytes
        end_byte = first_byte + rows * row_bytes
        raw = memory.device.bytes_at(self.elastic.vmm.base, end_byte)[first_byte:]
        return raw.view(self.store_dtype).view(rows, self.head_num, self.head_dim)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """(K bytes, V bytes) that are really mapped now, not the reserved range."""
        mapped = self.elastic.mapped_bytes
        return mapped // 2, mapped - mapped // 2

    def _move_kv_cache_impl(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        # SGLang's tiled copy is set up for speculative decoding only (memory_pool.py:1834).
        move_kv_cache_native(self.k_buffer, self.v_buffer, tgt_loc, src_loc)

    def get_contiguous_buf_infos(self) -> Any:
        raise UnsupportedModelError(
            f"{_model()}: prefill/decode disaggregation cannot register an elastic KV cache yet"
        )


def _model() -> str:
    """For messages; as models.toml calls it."""
    return RuntimeMemory.current().spec.model
