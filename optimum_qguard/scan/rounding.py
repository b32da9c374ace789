"""Rounds a model's weights as quantizers do, or changes them as much without a direction, and puts them back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from optimum_qguard.formats import Format, WeightError, get_format
from optimum_qguard.formats.gguf_mixture import ModelShape, gguf_name, tensor_type
from optimum_qguard.formats.gptq import GPTQ

FORMATS = ("int8-rowwise", "nf4", "fp4", "gptq-4", "gguf-q8_0", "gguf-q4_0", "gguf-q4_k_m")
"""Of GPTQ the grid alone, without its compensation of errors; of GGUF files the mixture that llama.cpp makes."""

_GGUF = "gguf-"
_GPTQ_GROUPS = (128, 64, 32)


class Weights:
    """The weights of a model that quantizers may round.

    Args:
        model: of transformers, in float32. `restore` gives every bit back.
    """

    def __init__(self, model: Any) -> None:
        from transformers.pytorch_utils import Conv1D

        self._config = model.config.get_text_config()
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        self._tied = head is None or head.weight is embeddings.weight
        self._linear: dict[str, tuple[Tensor, bool]] = {}
        self._others: dict[str, Tensor] = {}
        for path, module in model.named_modules():
            if module in (head, embeddings):
                if module is embeddings or not self._tied:
                    self._others[f"{path}.weight"] = module.weight
            elif isinstance(module, (nn.Linear, Conv1D)):
                self._linear[f"{path}.weight"] = module.weight, isinstance(module, Conv1D)
        for name, parameter in model.named_parameters():
            if ".experts." in name and parameter.dim() == 3:
                self._linear[name] = parameter, False
        parameters = [parameter for parameter, _ in self._linear.values()] + list(self._others.values())
        self._original = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Make all weights what they were."""
        for parameter, original in self._original:
            parameter.copy_(original)

    @torch.no_grad()
    def quantize(self, format: str, generator: torch.Generator | None = None) -> None:
        """Replace the original weights by what inference in that format would use.

        Args:
            format: one of `FORMATS`.
            generator: of random signs; then each weight is not rounded, but changed by as much one way or the other.

        Raises:
            ImportError: the package ``gguf`` or ``libgguf`` is missing, for GGUF formats.
            WeightError: weights that no quantizer takes.
        """
        self.restore()
        for parameter, transposed, one in self._formats(format):
            weight = parameter.T if transposed else parameter
            rounded = one.quantize(weight.detach()).dequantize()
            if generator is not None:
                heads = torch.randint(2, weight.shape, generator=generator, dtype=torch.uint8)
                rounded = weight + (rounded - weight) * (2.0 * heads - 1)
            weight.copy_(rounded)

    @torch.no_grad()
    def disturb(self, amplitude: float, seed: int) -> None:
        """Multiply each linear layer's original weights by one plus Gaussian noise of that standard deviation."""
        self.restore()
        generator = torch.Generator().manual_seed(seed)
        for parameter, _ in self._linear.values():
            parameter.mul_(torch.randn(parameter.shape, generator=generator).mul_(amplitude).add_(1))

    def _formats(self, format: str) -> Iterator[tuple[Tensor, bool, Format]]:
        if format.startswith(_GGUF):
            yield from self._gguf_formats(format.removeprefix(_GGUF))
            return
        one = get_format(format)
        if isinstance(one, GPTQ):
            lengths = {parameter.shape[-2 if turned else -1] for parameter, turned in self._linear.values()}
            fits = (group for group in _GPTQ_GROUPS if not any(length % group for length in lengths))
            one = GPTQ(one.bits, next(fits, _GPTQ_GROUPS[-1]))
        for parameter, transposed in self._linear.values():
            yield parameter, transposed, one

    def _gguf_formats(self, file: str) -> Iterator[tuple[Tensor, bool, Format]]:
        config = self._config
        heads = getattr(config, "num_attention_heads", 1)
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
        shape = ModelShape(
            layers=config.num_hidden_layers,
            heads_per_kv=heads // (getattr(config, "num_key_value_heads", None) or heads),
            experts=experts,
            tied_embeddings=self._tied,
            falcon=config.model_type == "falcon",
        )
        others = {name: (parameter, False) for name, parameter in self._others.items()}
        for name, (parameter, transposed) in (self._linear | others).items():
            converted = gguf_name(name)
            sizes = tuple(parameter.T.shape if transposed else parameter.shape)
            try:
                kind = None if converted is None else tensor_type(file, converted, sizes, shape)
            except WeightError:  # llama.cpp refuses such a model; here the tensor stays as it is
                kind = None
            if kind is not None:
                yield parameter, transposed, get_format(kind)
