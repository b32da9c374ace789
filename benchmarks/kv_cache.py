"""Models whose KV cache is quantized: rounded by arithmetic of ours, or kept by transformers' own quantized cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache
from transformers.modeling_outputs import CausalLMOutput

from optimum_qguard.evaluate.loading import load_model

_PIECE = 64  # tokens of a text that are read at once


def to_int8(values: torch.Tensor) -> torch.Tensor:
    """Keys or values of each token and head, ``(…, head_dim)``, to int8 by their absmax, and back."""
    scale = (values.float().abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (scale * (values.float() / scale).round()).to(values.dtype)


def to_float8(values: torch.Tensor) -> torch.Tensor:
    """To E4M3 and back, clamped, without a scale, as serving engines do by default."""
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).to(values.dtype)


def load_rounded_cache(folder: Path, rounded: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Full-precision weights; whatever enters the KV cache is rounded."""
    model = load_model(folder, device="cpu")

    def use_rounding_cache(_: Any, __: Any, arguments: dict[str, Any]) -> Any:
        given = arguments.get("past_key_values")
        if not isinstance(given, DynamicCache):
            given = DynamicCache(config=model.config)
        if "update" not in vars(given):
            update = given.update
            given.update = lambda keys, values, *rest, **more: update(rounded(keys), rounded(values), *rest, **more)
        return (), {**arguments, "past_key_values": given, "use_cache": True}

    model.model.register_forward_pre_hook(use_rounding_cache, with_kwargs=True)
    return model


def load_quantized_cache(folder: Path, **settings: Any) -> Any:
    """Full-precision weights and ``cache_implementation="quantized"``.

    That cache hands the first tokens on as they are and quantizes them for those that come later, so a text is read in
    pieces, as a conversation would be; read at once it would not meet the cache at all.

    Args:
        settings: what ``cache_config`` takes, for instance ``backend="quanto", nbits=4``.
    """
    model = load_model(folder, device="cpu")
    model.generation_config.cache_implementation = "quantized"
    model.generation_config.cache_config = settings
    forward = model.forward

    @wraps(forward)
    def read_in_pieces(*arguments: Any, use_cache: bool | None = None, **named: Any) -> Any:
        if use_cache is not False:
            return forward(*arguments, use_cache=use_cache, **named)
        cache = QuantizedCache(config=model.config, **settings)
        pieces = arguments[0].split(_PIECE, dim=1)
        logits = [forward(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
        return CausalLMOutput(logits=torch.cat(logits, dim=1))

    model.forward = read_in_pieces
    return model
