"""First passes of an engine on a card, before anybody waits for them.

They compile and load what is compiled and loaded at first use (seconds), and bring torch's memory to the size that
it will have, so that the lease of the overhead is true before neighbours are placed beside it (overhead.py).
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from prism_sgl.messages import RuntimeFacts

# A few prompts at once and more tokens than one: prefill, decode, and batches of another size than one.
_PROMPTS = (16, 40, 100)
_ANSWER_TOKENS = 8


async def warm_up(tokenizer_manager: Any, facts: RuntimeFacts) -> None:
    """Short prompts, then the longest prefill pass that may come; its KV is dropped again."""
    longest = facts.max_request_tokens - _ANSWER_TOKENS - facts.block_tokens
    chunk = tokenizer_manager.server_args.chunked_prefill_size
    if chunk and chunk > 0:
        longest = min(longest, chunk)
    if longest <= 0:
        return  # a block holds more than a request may
    for lengths in (_PROMPTS, (longest,)):
        prompts = [[1] * min(length, longest) for length in lengths]
        request = _request(prompts, answers=tokenizer_manager.is_generation)
        async for _ in tokenizer_manager.generate_request(request, None):
            pass
    await tokenizer_manager.flush_cache()


def _request(prompts: list[list[int]], *, answers: bool) -> GenerateReqInput | EmbeddingReqInput:
    """A model that embeds or classifies has no decode: SGLang's scheduler dies of a request that asks it for one."""
    if not answers:
        return EmbeddingReqInput(input_ids=prompts)
    return GenerateReqInput(
        input_ids=prompts,
        sampling_params={"temperature": 0, "max_new_tokens": _ANSWER_TOKENS, "ignore_eos": True},
    )
