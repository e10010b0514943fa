"""What an engine on a card is asked before it says Hello; SGLang's own classes tell what its scheduler makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from prism_sgl.engine.warm_up import warm_up
from prism_sgl.messages import RuntimeFacts

BLOCK_TOKENS = 16
MAX_REQUEST_TOKENS = 4095
WHOLE = MAX_REQUEST_TOKENS - 8 - BLOCK_TOKENS  # an answer and admission's reserve beside it
FACTS = RuntimeFacts(
    weights_bytes=0,
    overhead_bytes=0,
    kv_bytes_per_token=1,
    max_request_tokens=MAX_REQUEST_TOKENS,
    floor_bytes=0,
    ceiling_bytes=0,
    max_running_requests=8,
    block_tokens=BLOCK_TOKENS,
)


class TokenizerManager:
    """As much of SGLang's as a warm-up uses. Requests end up as the scheduler would have them."""

    def __init__(self, chunked_prefill_size: int | None, *, is_generation: bool = True) -> None:
        self.server_args = SimpleNamespace(chunked_prefill_size=chunked_prefill_size)
        self.is_generation = is_generation
        self.requests: list[Req] = []
        self.flushed_after = 0

    async def generate_request(
        self, obj: GenerateReqInput | EmbeddingReqInput, _: None
    ) -> AsyncIterator[None]:
        obj.normalize_batch_and_arguments()
        for index in range(obj.batch_size):
            item = obj[index]
            sampling = SamplingParams(**item.sampling_params)
            sampling.normalize(None)
            self.requests.append(Req(item.rid, "", item.input_ids, sampling, vocab_size=256))
        yield None

    async def flush_cache(self) -> None:
        self.flushed_after = len(self.requests)


def warmed(manager: TokenizerManager) -> list[Req]:
    asyncio.run(warm_up(manager, FACTS))
    assert manager.flushed_after == len(manager.requests)
    return manager.requests


def decodes(request: Req) -> bool:
    """After its prefill, with its one token, the request goes on."""
    request.output_ids.append(0)
    request.update_finish_state()
    return not request.finished()


@pytest.mark.parametrize(
    ("chunk", "longest"),
    [(2048, 2048), (1 << 20, WHOLE), (None, WHOLE), (0, WHOLE), (-1, WHOLE)],
)
def test_the_longest_pass_comes_last(chunk: int | None, longest: int) -> None:
    """Whole prompts where nothing is chunked: SGLang says -1 by itself for some models and options."""
    requests = warmed(TokenizerManager(chunk))
    assert [len(request.origin_input_ids) for request in requests] == [16, 40, 100, longest]


@pytest.mark.parametrize("is_generation", [True, False])
def test_only_a_model_that_generates_decodes(is_generation: bool) -> None:
    """SGLang's scheduler dies of a decode where the model embeds or classifies."""
    requests = warmed(TokenizerManager(2048, is_generation=is_generation))
    assert [decodes(request) for request in requests] == [is_generation] * 4
