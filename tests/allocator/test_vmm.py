from __future__ import annotations

import pytest

from prism_sgl.allocator.vmm import merge_runs, num_pages_in


def test_neighbouring_runs_are_one_call() -> None:
    runs = [range(4, 6), range(0, 2), range(2, 4), range(8, 9), range(7, 7)]
    assert merge_runs(runs) == [range(0, 6), range(8, 9)]
    assert num_pages_in(runs) == 7


def test_a_page_may_not_occur_twice() -> None:
    with pytest.raises(ValueError, match="page 1 occurs twice"):
        merge_runs([range(0, 2), range(1, 3)])
    with pytest.raises(ValueError, match="not a run"):
        merge_runs([range(0, 4, 2)])
