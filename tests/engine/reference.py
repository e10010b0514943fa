"""What the model really says: greedy tokens of transformers, one prompt at a time, in float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

MODEL_PATH = Path("~/.cache/prism_sgl/models/smollm2").expanduser()


@cache
def _model() -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    return tokenizer, model.eval()


def tokens_of(text: str) -> list[int]:
    tokenizer, _ = _model()
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def greedy(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """The ``num_tokens`` greedy tokens after ``prompt``, end-of-sequence ignored."""
    return greedy_batch((prompt,), num_tokens)[0]


def greedy_given(prompt: list[int], answer: list[int]) -> list[int]:
    """At each place of ``answer`` the greedy token after all before it: equal to ``answer`` exactly if that is greedy.
    One pass, where ``greedy`` needs one a token."""
    import torch

    _, model = _model()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0]
    told: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    return told


@cache
def greedy_batch(prompts: tuple[tuple[int, ...], ...], num_tokens: int) -> list[list[int]]:
    """The same for prompts of one length at once: a batch costs little more than one of them."""
    import torch

    _, model = _model()
    ids = torch.tensor(prompts)
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
        )
    answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return answers
