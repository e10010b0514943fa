"""SGLang's pool in our layout: the real class, over a real host arena that a real ledger pays for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from prism_sgl.allocator.ledger import Kind, Ledger
from prism_sgl.engine.kv_layout import MAX_ROWS, KvLayout
from prism_sgl.engine.kv_pool import ElasticKVPool
from prism_sgl.engine.runtime_memory import RuntimeMemory
from prism_sgl.errors import UnsupportedModelError
from tests.engine.specs import runtime_spec

PAGE = 2 << 20
BUDGET_PAGES = 16
LAYERS, HEADS, DIM = 3, 2, 40  # a row of 160 or 80 bytes: blocks do not divide a page

MakePool = Callable[..., ElasticKVPool]


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RuntimeMemory]:
    """What a scheduler process holds, without the engine around it."""
    path = str(tmp_path / "ledger")
    Ledger.create(path, BUDGET_PAGES * PAGE, "host0")
    memory = RuntimeMemory(runtime_spec(ledger_path=path, run_dir=str(tmp_path)))
    monkeypatch.setattr(RuntimeMemory, "_current", memory)
    yield memory
    if memory.kv is not None:
        memory.kv.vmm.close()
    memory.bell.close()


@pytest.fixture
def make_pool(memory: RuntimeMemory) -> MakePool:
    def make(
        size: int, page_size: int = 1, dtype: torch.dtype = torch.bfloat16, **options: object
    ) -> ElasticKVPool:
        shape = {"head_num": HEADS, "head_dim": DIM, "layer_num": LAYERS}
        return ElasticKVPool(
            size, page_size, dtype, device="cpu", enable_memory_saver=False, **{**shape, **options}
        )

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("block_tokens", [1, 16])
def test_moved_tokens_take_every_layers_k_and_v_along_and_nothing_else(
    make_pool: MakePool, block_tokens: int, dtype: torch.dtype
) -> None:
    """Between pages and within them; the arena's bytes afterwards are what plain indexing makes of them."""
    layout = KvLayout.plan(
        layers=LAYERS, row_bytes=HEADS * DIM * dtype.itemsize, block_tokens=block_tokens, page_bytes=PAGE
    )
    num_pages = 4
    size = num_pages * layout.page.blocks * block_tokens - block_tokens
    pool = make_pool(size, block_tokens, dtype)
    assert pool.elastic.pages.num_pages == num_pages
    assert pool.elastic.grow(num_pages - 1) is not None

    generator = torch.Generator().manual_seed(7)
    arena = RuntimeMemory.current().device.bytes_at(pool.elastic.vmm.base, num_pages * PAGE)
    arena.copy_(torch.randint(256, arena.shape, dtype=torch.uint8, generator=generator))
    blocks = torch.randperm(num_pages * layout.page.blocks - 1, generator=generator)[:500] + 1
    ids = layout.ids(blocks)
    assert set(layout.pages(ids).tolist()) == set(range(num_pages))
    slots = ids * block_tokens + torch.randint(block_tokens, ids.shape, generator=generator)
    source, target = slots[:250], slots[250:]

    def rows(slots: torch.Tensor) -> list[torch.Tensor]:
        """Where each plane's rows of these slots lie in the arena, by the layout's words and not by the views."""
        first = slots * layout.row_bytes
        row = torch.arange(layout.row_bytes)
        plane_bytes = layout.plane_rows * layout.row_bytes
        return [first[:, None] + plane * plane_bytes + row for plane in range(2 * LAYERS)]

    expected = arena.clone()
    for at, was in zip(rows(target), rows(source), strict=True):
        expected[at] = arena[was]
    pool.move_kv_cache(target, source)
    assert torch.equal(arena, expected)
    for layer in range(LAYERS):
        for plane in pool.get_key_buffer(layer), pool.get_value_buffer(layer):
            assert torch.equal(plane[target].view(torch.uint8), plane[source].view(torch.uint8))
    pool.move_kv_cache(target[:0], source[:0])
    assert torch.equal(arena, expected)


def test_a_pool_holds_what_is_mapped_and_no_more(make_pool: MakePool, memory: RuntimeMemory) -> None:
    pool = make_pool(40_000)
    pages = memory.kv
    assert pages is pool.elastic
    assert sum(pool.get_kv_size_bytes()) == PAGE == memory.owner.held(Kind.KV) * PAGE
    assert pool.size + pool.page_size == len(pool.k_buffer[0]) > 40_000
    pool.elastic.grow(1)
    assert sum(pool.get_kv_size_bytes()) == 2 * PAGE


@pytest.mark.parametrize("block_tokens", [1, 16])
def test_slot_numbers_beyond_int32_are_refused_before_anything_is_mapped(
    make_pool: MakePool, memory: RuntimeMemory, block_tokens: int
) -> None:
    """Numbers count rows of one layer's K, gaps included: with small rows they outgrow SGLang's table first."""
    row_bytes, planes = 64, 2 * 30
    too_many = MAX_ROWS // planes  # tokens; their numbers are this many times as large
    with pytest.raises(UnsupportedModelError) as refused:
        make_pool(
            too_many // block_tokens * block_tokens + 100_000 * block_tokens,
            block_tokens,
            torch.float8_e4m3fn,
            head_num=1,
            head_dim=row_bytes,
            layer_num=planes // 2,
        )
    message = str(refused.value)
    assert message.startswith("chat: ") and "rows of 64 bytes" in message and str(MAX_ROWS) in message
    assert "max_kv" in message and "\n" not in message
    assert memory.kv is None and memory.owner.held(Kind.KV) == 0


def test_the_largest_number_of_a_layout_is_known_before_it_is_built() -> None:
    """``num_rows`` is the last slot's number and one: what an int32 must hold with one to spare."""
    layout = KvLayout.plan(layers=30, row_bytes=64, block_tokens=16, page_bytes=PAGE)
    for num_blocks in (1, layout.page.blocks, layout.page.blocks + 1, 1_000_000):
        last = layout.ids(torch.tensor([num_blocks - 1])) * 16 + 15
        assert int(last) + 1 == layout.num_rows(num_blocks)
    assert torch.iinfo(torch.int32).max == MAX_ROWS


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quant_method": object()}, "a 4-bit KV cache"),
        ({"kv_cache_layout": "page_major"}, "KV layout page_major"),
        ({"v_head_dim": DIM // 2}, f"heads of {DIM} for K and {DIM // 2} for V"),
    ],
)
def test_another_pool_is_refused_in_one_line_with_the_models_name(
    make_pool: MakePool, memory: RuntimeMemory, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        make_pool(1000, **options)
    assert str(refused.value).startswith(f"chat: {reason}") and "\n" not in str(refused.value)
    assert memory.kv is None


def test_hnd_layout_and_disaggregation_are_refused_with_the_models_name(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^chat: prefill/decode disaggregation"):
        make_pool(1000).get_contiguous_buf_infos()
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    with pytest.raises(UnsupportedModelError, match=r"^chat: KV layout hnd"):
        make_pool(1000)
