"""Our two SGLang entry points. Installed is not active: both do nothing unless our worker started the process.

Light on purpose: SGLang imports this module while it resolves its platform, long before its scheduler and
memory pools can be imported (facts: srt/platforms/__init__.py:49, srt/plugins/__init__.py:103).
"""

from __future__ import annotations

from prism_sgl.engine import spec


def platform() -> str | None:
    """Entry point ``sglang.srt.platforms``: the class name of our host platform, or None for SGLang's own."""
    if spec.device_kind() == "host":
        return "prism_sgl.engine.platform.HostPlatform"
    return None


def register() -> None:
    """Entry point ``sglang.srt.plugins``: hand our hooks to SGLang's registry."""
    if spec.device_kind() is None:
        return
    from prism_sgl.engine.seams import register_hooks

    register_hooks()
