"""What the demo, benchmarks and tests measure with: a real model and text without a download, perplexity, KL."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimum_qguard.evaluate.perplexity import kl_divergence, next_token_logits, perplexity
    from optimum_qguard.evaluate.smollm2 import smollm2_path
    from optimum_qguard.evaluate.text import standard_library_text

_HOMES = {
    "kl_divergence": "perplexity",
    "next_token_logits": "perplexity",
    "perplexity": "perplexity",
    "smollm2_path": "smollm2",
    "standard_library_text": "text",
}
__all__ = ["kl_divergence", "next_token_logits", "perplexity", "smollm2_path", "standard_library_text"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
