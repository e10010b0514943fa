"""The KV layout against bytes: every row of every block and plane has a place of its own, inside its block's page."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_sgl.engine.kv_layout import KvLayout
from prism_sgl.footprint import floor_bytes, kv_page

PAGE = 1 << 14


@st.composite
def layouts(draw: st.DrawFn) -> KvLayout:
    layers = draw(st.integers(1, 8))
    row_bytes = draw(st.sampled_from([4, 6, 16, 20, 48, 64, 100]))
    block_tokens = draw(st.sampled_from([1, 2, 16]))
    return KvLayout.plan(layers=layers, row_bytes=row_bytes, block_tokens=block_tokens, page_bytes=PAGE)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(layout=layouts(), num_pages=st.integers(1, 3))
def test_rows_never_meet_and_stay_on_their_page(layout: KvLayout, num_pages: int) -> None:
    blocks = np.arange(num_pages * layout.page.blocks, dtype=np.int64)
    ids = layout.ids(blocks)
    assert (layout.blocks(ids) == blocks).all()
    assert (layout.pages(ids) == blocks // layout.page.blocks).all()
    assert ids[0] == 0, "block 0 is SGLang's padding sink"
    tokens = (ids[:, None] * layout.block_tokens + np.arange(layout.block_tokens)).ravel()
    assert int(tokens.max()) < layout.num_rows(len(blocks))
    # A view is shifted by whole planes: the row that a token has in plane j.
    rows = tokens[None, :] + np.arange(2 * layout.layers)[:, None] * layout.plane_rows
    assert len(np.unique(rows)) == rows.size
    pages = np.repeat(blocks // layout.page.blocks, layout.block_tokens)
    assert (rows * layout.row_bytes // layout.page.page_bytes == pages).all()
    assert (((rows + 1) * layout.row_bytes - 1) // layout.page.page_bytes == pages).all()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(block_bytes=st.integers(1, 40 * PAGE), tokens=st.integers(1, 3000))
def test_a_page_is_filled_well_and_a_floor_holds_its_tokens(block_bytes: int, tokens: int) -> None:
    page = kv_page(block_bytes, PAGE)
    assert page.page_bytes % PAGE == 0
    assert page.blocks >= 1
    assert page.blocks * block_bytes <= page.page_bytes
    if block_bytes <= PAGE // 32:
        assert page.page_bytes == PAGE, "small blocks need no joined pages"
    floor = floor_bytes(request_tokens=tokens, block_tokens=1, token_bytes=block_bytes, page_bytes=PAGE)
    assert floor // page.page_bytes * page.blocks >= tokens + 3


def test_real_shapes_fill_their_pages() -> None:
    """Llama 8B, 3B and 1B on a card; SmolLM2 on the host."""
    cases = {
        (32, 2048, 64 << 20): 512,
        (28, 2048, 64 << 20): 585,
        (16, 1024, 64 << 20): 2048,
        (30, 384, 2 << 20): 90,
    }
    for (layers, row_bytes, page_bytes), tokens in cases.items():
        layout = KvLayout.plan(layers=layers, row_bytes=row_bytes, block_tokens=1, page_bytes=page_bytes)
        assert (layout.page.page_bytes, layout.page.blocks) == (page_bytes, tokens)
