"""The only room that imports sglang and torch: one runtime = one unforked SGLang engine on elastic memory."""
