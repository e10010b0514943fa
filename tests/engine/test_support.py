"""What cannot run on elastic memory is refused by name, never run with a stock pool in silence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prism_sgl.engine.support import refuse_unsupported_model, refuse_unsupported_options
from prism_sgl.errors import UnsupportedModelError


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tp_size", 2),
        ("nnodes", 2),
        ("ep_join_mode", "scale"),
        ("enable_lora", True),
        ("speculative_algorithm", "EAGLE"),
        ("enable_hierarchical_cache", True),
        ("disaggregation_mode", "prefill"),
        ("enable_memory_saver", True),
        ("kv_cache_dtype", "fp4_e2m1"),
    ],
)
def test_an_unsupported_option_is_named(option: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"chat: engine_args\.{option} = "):
        refuse_unsupported_options(SimpleNamespace(**{option: value}), "chat")


def test_plain_options_pass() -> None:
    refuse_unsupported_options(SimpleNamespace(tp_size=1, enable_lora=None, kv_cache_dtype="auto"), "chat")
    refuse_unsupported_options(SimpleNamespace(device="cuda", kv_cache_dtype="fp8_e4m3"), "chat")


def test_fp8_kv_needs_a_card() -> None:
    with pytest.raises(UnsupportedModelError, match="needs a device of kind cuda"):
        refuse_unsupported_options(SimpleNamespace(device="cpu", kv_cache_dtype="fp8_e4m3"), "chat")


def model(**fields: object) -> SimpleNamespace:
    plain = {
        "hf_config": SimpleNamespace(architectures=["SomeForCausalLM"]),
        "hf_text_config": SimpleNamespace(),
        "is_hybrid_swa": False,
        "attention_arch": "AttentionArch.MHA",
    }
    return SimpleNamespace(**(plain | fields))


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"is_hybrid_swa": True}, "sliding-window"),
        ({"attention_arch": "AttentionArch.MLA"}, "MLA"),
        ({"hf_text_config": SimpleNamespace(linear_num_key_heads=4)}, "linear or hybrid"),
    ],
)
def test_an_unsupported_model_is_named(fields: dict[str, object], kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"chat: SomeForCausalLM has .*{kind}"):
        refuse_unsupported_model(model(**fields), "chat")


def test_a_plain_model_passes() -> None:
    refuse_unsupported_model(model(), "chat")
