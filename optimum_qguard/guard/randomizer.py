"""What guard does to the weights of one model: outliers brought back, roundings drawn at random, and a note of each."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optimum_qguard.formats import Format, Scratch
from optimum_qguard.guard.backends import backend_of, require
from optimum_qguard.guard.compensation import hand_over
from optimum_qguard.guard.config import QGuardConfig
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError
from optimum_qguard.guard.noise import Draw, Method, draw, half_width
from optimum_qguard.guard.outliers import clip_outliers
from optimum_qguard.guard.prerounding import Prerounding
from optimum_qguard.guard.random import RandomStream, fresh_seed
from optimum_qguard.guard.rebalance import Rescaling, rescaled_channels
from optimum_qguard.guard.report import GuardReport, TensorReport


class Randomizer:
    """As a configuration says, for one model.

    Args:
        config: how.
        inner: the library's own configuration, as its quantizer has it.

    Tensors are named as the model names them; their values have the shape in which the library quantizes them.

    Attributes:
        backend: the library.
        expected: names of the tensors that it will quantize.
        rescalings: by tensor, what undoes outliers that a norm balances.
        global_amplitude: the median half-width of all tensors, where the configuration asks for that.
        prerounding: symbols that are chosen with error feedback, if they are.
        tensors: what was done, by name.

    Raises:
        QGuardConfigError: the configuration asks for what the library's format does not allow.
    """

    def __init__(self, config: QGuardConfig, inner: Any) -> None:
        self._config = config
        self._inner = inner
        self.backend = backend_of(self._inner)
        require(self.backend)
        self._seed = fresh_seed() if config.seed is None else int(config.seed)
        self._scratch = Scratch()
        self._mended: dict[str, int] = {}
        self.expected: set[str] = set()
        self.rescalings: dict[str, list[Rescaling]] = {}
        self.global_amplitude: float | None = None
        self.prerounding: Prerounding | None = None
        self.tensors: dict[str, TensorReport] = {}
        self.keeps_symbols = self.backend.keeps_symbols(self._inner)
        unknown = f"{type(self._inner).__name__} has no grid that guard knows beforehand, so"
        if config.method == "stochastic" and not self.keeps_symbols:
            raise QGuardConfigError(f"{unknown} there is nothing to round to: use method='auto' or 'gaussian'")
        if config.compensate is not None:
            if not self.keeps_symbols:
                raise QGuardConfigError(f"{unknown} errors cannot be compensated on it: leave compensate None")
            self.preround_on(config.compensate)

    def preround_on(self, samples: Any) -> None:
        """Have symbols chosen with error feedback, on ``samples`` (see `QGuardConfig`)."""
        self.prerounding = Prerounding(samples, self._seed)

    def format_of(self, model: nn.Module, name: str) -> Format:
        """What the library makes of a tensor."""
        return self._format(model, name)[1]

    def half_width(self, model: nn.Module, name: str, value: Tensor) -> float:
        """The median half-width of its cells."""
        module, format = self._format(model, name)
        weight, _ = self._clip(value.T if self.backend.is_transposed(module) else value, format, name)
        return half_width(weight, format, name)

    @torch.no_grad()
    def mend(self, model: nn.Module) -> None:
        """Clip in the full-precision model what will be clipped on the way to the quantizer: symbols are to be chosen
        for the same weights, and samples to see them."""
        if self._config.outlier_threshold is None:
            return
        for name, parameter in model.named_parameters():
            if name in self.expected and not parameter.is_meta:
                module, format = self._format(model, name)
                transposed = isinstance(module, Conv1D)
                weight, clipped = self._clip(parameter.data.T if transposed else parameter.data, format, name)
                parameter.data = weight.T if transposed else weight
                self._mended[name] = clipped
        self.rescale_norms(model)

    def rescale_norms(self, model: nn.Module) -> None:
        """The other half of what clipping does to the weights that are quantized.

        Raises:
            QGuardError: a norm is offloaded.
        """
        for name in self.rescalings.keys() - self.expected:
            parameter = model.get_parameter(name)
            if parameter.is_meta:
                raise QGuardError(
                    f"the model was not loaded: {name} must be rescaled to undo planted outliers, and is offloaded; "
                    "load the model without offloading, or with clip_outliers=None"
                )
            for rescaling in self.rescalings[name]:
                parameter.data.copy_(rescaling.apply(parameter.data))

    def randomize(self, model: nn.Module, name: str, value: Tensor) -> Tensor:
        """What the library is to quantize in place of ``value``, of the same shape, in the dtype that it takes."""
        module, format = self._format(model, name)
        weight, clipped = self._clip(value.T if self.backend.is_transposed(module) else value, format, name)
        drawn, method = self._draw(weight, format, name)
        self.tensors[name] = TensorReport(
            name=name,
            format=str(format),
            method=method,
            amplitude=drawn.amplitude,
            weights=weight.numel(),
            share_changed=drawn.share_changed,
            sampled=drawn.sampled,
            clipped=max(clipped, self._mended.get(name, 0)),  # in place, if it was mended already
            rescaled=rescaled_channels(self.rescalings.get(name, ())),
        )
        return drawn.weight.T if self.backend.is_transposed(module) else drawn.weight

    def _draw(self, weight: Tensor, format: Format, name: str) -> tuple[Draw, Method | Literal["compensated"]]:
        dtype = self.backend.handover_dtype(self._inner, weight)
        codes = None if self.prerounding is None else self.prerounding.codes(name, weight)
        if codes is not None:
            return hand_over(weight, format, codes, dtype=dtype, name=name), "compensated"
        method, per_cell = self._config.method_for(
            known=self.backend.exact and not self.backend.calibrates and format.fixed_for(weight.dtype),
            estimated=not self.backend.exact,
        )
        # Per layer and per cell there is none yet: `draw` takes half-widths of its own.
        base = self.global_amplitude if isinstance(self._config.noise, str) else float(self._config.noise)
        drawn = draw(
            weight,
            format,
            method,
            RandomStream(self._seed, name, self._scratch),
            amplitude=None if method == "stochastic" or base is None else base * self._config.multiplier,
            half_widths=self._config.multiplier,
            per_cell=per_cell,
            dtype=dtype,
            name=name,
            scratch=self._scratch,
        )
        return drawn, method

    def _format(self, model: nn.Module, name: str) -> tuple[nn.Module, Format]:
        module = model.get_submodule(name.rpartition(".")[0])
        return module, self.backend.format_of(self._inner, module, name)

    def _clip(self, weight: Tensor, format: Format, name: str) -> tuple[Tensor, int]:
        for rescaling in self.rescalings.get(name, ()):
            weight = rescaling.apply(weight)
        threshold = self._config.outlier_threshold
        return (weight, 0) if threshold is None else clip_outliers(weight, format, threshold, self._scratch)

    def report(self, model: Any) -> GuardReport:
        """Of everything so far."""
        return GuardReport(
            model=str(model.name_or_path),
            revision=getattr(model.config, "_commit_hash", None),
            method=self._config.method,
            noise=self._config.noise,
            multiplier=self._config.multiplier,
            seed=f"{self._seed:064x}",
            fresh_seed=self._config.seed is None,
            samples=None if self.prerounding is None else self.prerounding.report,
            quantization_config=_json_safe(
                {key: value for key, value in self._inner.to_dict().items() if key not in ("dataset", "tokenizer")}
            ),
            tensors=[self.tensors[name] for name in sorted(self.tensors)],
        )


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
