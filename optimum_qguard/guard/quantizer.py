"""The hook: everything that touches what transformers does not document for plugins. Written against transformers 5.23.

transformers quantizes one parameter at a time while it loads: its quantizer's ``get_quantize_ops`` gives an operation
whose ``convert`` gets the merged full-precision tensor. `Guard` puts itself in front of that operation on one instance
of the library's own quantizer, and steps aside when the model is loaded: what the user holds, and saves, is the
library's model and nothing else. Libraries that calibrate (GPTQ) quantize after loading; there the noise is added just
before.

transformers swallows exceptions inside ``convert`` and goes on without the parameter. `Guard` therefore keeps the first
one, counts what it guarded, and raises at the end if any tensor that the library quantized was not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from optimum_qguard.checkpoint.hub import commit_of
from optimum_qguard.checkpoint.protection import UNLOCKED, protection_of
from optimum_qguard.formats import Format, Scratch, WeightError
from optimum_qguard.guard.architecture import refuse_protected
from optimum_qguard.guard.backends import backend_of, require
from optimum_qguard.guard.compensation import hand_over
from optimum_qguard.guard.config import QUANT_METHOD, QGuardConfig
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError
from optimum_qguard.guard.global_noise import global_half_width
from optimum_qguard.guard.load_checks import check_files, is_quantized, not_loaded
from optimum_qguard.guard.noise import Draw, Method, draw, half_width
from optimum_qguard.guard.outliers import clip_outliers
from optimum_qguard.guard.prerounding import Prerounding, full_precision
from optimum_qguard.guard.random import RandomStream, fresh_seed
from optimum_qguard.guard.rebalance import Rescaling, find_balanced_outliers, rescaled_channels
from optimum_qguard.guard.report import GuardReport, TensorReport
from optimum_qguard.guard.saving import push_with_report, save_with_report

build_quantizer = AutoHfQuantizer.from_config


class Guard:
    """Guards one ``from_pretrained`` call."""

    def __init__(self, config: QGuardConfig, quantizer: Any) -> None:
        self._config = config
        self._inner = quantizer.quantization_config
        self._backend = backend_of(self._inner)
        require(self._backend)
        self._quantizer = quantizer
        self._seed = fresh_seed() if config.seed is None else int(config.seed)
        self._global_amplitude: float | None = None
        self._scratch = Scratch()
        self._rescalings: dict[str, list[Rescaling]] = {}
        self._expected: set[str] = set()
        self._tensors: dict[str, TensorReport] = {}
        self._mended: dict[str, int] = {}
        self._failure: QGuardError | None = None
        self._keeps_symbols = self._backend.keeps_symbols(self._inner)
        if config.method == "stochastic" and not self._keeps_symbols:
            raise QGuardConfigError(
                f"{type(self._inner).__name__} has no grid that guard knows beforehand, so there is nothing to round "
                "to: use method='auto' or 'gaussian'"
            )
        self._prerounding: Prerounding | None = None
        if config.compensate is not None:
            if not self._keeps_symbols:
                raise QGuardConfigError(
                    f"{type(self._inner).__name__} has no grid that guard knows beforehand, so errors cannot be "
                    "compensated on it: leave compensate None"
                )
            self._prerounding = Prerounding(config.compensate, self._seed)
        self._originals = {name: getattr(quantizer, name) for name in ("preprocess_model", "postprocess_model")}
        if not self._backend.calibrates:
            self._originals["get_quantize_ops"] = quantizer.get_quantize_ops
        for name in self._originals:
            setattr(quantizer, name, getattr(self, name))

    def preprocess_model(self, model: Any, **kwargs: Any) -> None:
        """Note what the library will quantize, once it has put its modules in place."""
        files = kwargs.get("checkpoint_files")
        check_files(files)
        commit = commit_of(files or ())
        if commit is not None:
            model.config._commit_hash = commit  # transformers 5.23 does not note it any more
        if not getattr(model, UNLOCKED, False):
            found = protection_of(model, files)
            refuse_protected(f"the model was not loaded: {model.name_or_path}", found and found[1])
        model.config.quantization_config = self._inner
        self._originals["preprocess_model"](model=model, **kwargs)
        if self._backend.calibrates:
            return
        self._raise_after_loading(model)
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self._expected = {name for name in names if self._is_quantized_on_load(model, name)}
        if self._config.outlier_threshold is not None:
            model_type = model.config.get_text_config().model_type
            self._rescalings = find_balanced_outliers(files or (), model_type, self._expected)
        if self._config.noise == "global":
            try:
                self._global_amplitude = global_half_width(
                    model, files, self._quantizer, self._expected, self._half_width
                )
            except WeightError as error:
                raise not_loaded(error) from error
        if self._prerounding is not None:
            self._preround_before_loading(model, self._prerounding, **kwargs)

    def _preround_before_loading(
        self, model: Any, prerounding: Prerounding, dtype: Any, device_map: Any, checkpoint_files: Any, **_: Any
    ) -> None:
        """Choose all symbols in the first method that transformers calls once the skeleton is done: before that, what
        it builds is on the meta device."""
        formats = {name: self._format(model, name)[1] for name in sorted(self._expected)}
        for name, format in formats.items():
            if not format.fixed_for(dtype):
                way_out = "load with dtype=torch.float32, or " if format.fixed_for(torch.float32) else ""
                raise QGuardConfigError(
                    f"{name}: {format} has no fixed grid for {dtype} weights, so errors cannot be compensated on it: "
                    f"{way_out}leave compensate None"
                )
        proceed = model._get_dtype_plan

        def preround_and_proceed(dtype: torch.dtype) -> Any:
            del model._get_dtype_plan
            try:
                full = full_precision(model, checkpoint_files, dtype, device_map)
                self._mend(full)
                prerounding.run(full, formats)
            except (WeightError, QGuardError) as error:
                raise not_loaded(error) from error
            return proceed(dtype)

        model._get_dtype_plan = preround_and_proceed

    def _raise_after_loading(self, model: Any) -> None:
        """Have the first failure raised by the first method that transformers calls once the weights are loaded, in
        place of its own report: one line that says what is wrong."""
        proceed = model.mark_tied_weights_as_initialized

        def raise_or_proceed(loading_info: Any) -> None:
            del model.mark_tied_weights_as_initialized
            if self._failure is not None:
                for found in (loading_info.conversion_errors, loading_info.missing_keys, loading_info.unexpected_keys):
                    found.clear()
                raise self._failure
            proceed(loading_info)

        model.mark_tied_weights_as_initialized = raise_or_proceed

    def get_quantize_ops(self) -> ConversionOps:
        """The library's operation, with guard in front of it."""
        return _GuardedQuantize(self._originals["get_quantize_ops"](), self)

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        """Step aside, let the library finish, and make sure that nothing was missed."""
        for name in self._originals:
            delattr(self._quantizer, name)
        if self._backend.calibrates:
            self._guard_loaded(model)
        self._quantizer.postprocess_model(model, **kwargs)
        if self._backend.calibrates:
            self._backend.forget_samples(self._quantizer, model)
            self._expected |= {f"{name}.weight" for name in self._backend.calibrated_modules(model)}
        missed = sorted(name for name in self._expected - self._tensors.keys() if is_quantized(model, name))
        if missed:
            raise QGuardError(
                f"the model was not loaded: {len(missed)} tensor(s) were quantized without guard, the first "
                f"{missed[0]}; please report this with the model's name"
            )
        if not self._tensors:
            raise QGuardError(
                f"the model was not loaded: {type(self._inner).__name__} quantized none of its tensors, so there is "
                "nothing to guard; load it without QGuardConfig, or check modules_to_not_convert"
            )
        self._rescale_norms(model)
        model.qguard_report = self._report(model)
        model.qguard_report.warn_if_clipped()
        if self._prerounding is not None:
            self._prerounding.close()
        # Not a method of the instance: that would be looked up by name when the model is unpickled.
        model.save_pretrained = partial(save_with_report, model)
        model.push_to_hub = partial(push_with_report, model)

    def convert(self, tensors: dict[str, Any], model: nn.Module, operation: Callable[[dict[str, Any]], Any]) -> Any:
        """Randomize the tensors that the library is about to quantize, then let it."""
        if self._failure is not None:
            raise QGuardError("not loaded, because guard failed before")
        names = list(tensors)
        try:
            guarded = {}
            for name in names:
                value = tensors.pop(name)
                if name in self._expected or self._is_quantized_on_load(model, name):
                    weight = self._randomize(model, name, value[0] if isinstance(value, list) else value)
                    value = [weight] if isinstance(value, list) else weight
                guarded[name] = value
            return operation(guarded)
        except Exception as error:
            self._failure = not_loaded(error, *names)
            self._failure.__cause__ = error
            raise

    def _is_quantized_on_load(self, model: nn.Module, name: str) -> bool:
        if not self._quantizer.param_needs_quantization(model, name):
            return False
        return self._backend.quantizes(self._inner, model.get_submodule(name.rpartition(".")[0]), name)

    def _guard_loaded(self, model: Any) -> None:
        modules = self._backend.modules_to_calibrate(self._inner, self._quantizer, model)
        weights: dict[str, Any] = {f"{name}.weight": module.weight for name, module in modules.items()}
        self._expected = set(weights)
        offloaded = next((name for name, weight in weights.items() if weight.is_meta), None)
        if offloaded is not None:
            raise QGuardError(
                f"the model was not loaded: {offloaded} is offloaded, where guard cannot reach it before it is "
                "calibrated; load the model without offloading"
            )
        try:
            if self._config.leaves_all_open and self._keeps_symbols and model.can_generate():
                self._prerounding = Prerounding("auto", self._seed)
            if self._prerounding is not None:
                self._mend(model)
                self._prerounding.run(model, {name: self._format(model, name)[1] for name in weights})
            if self._config.noise == "global":
                self._global_amplitude = median(
                    self._half_width(model, name, weight.data) for name, weight in weights.items()
                )
            for name, weight in weights.items():
                weight.data = self._randomize(model, name, weight.data)
        except (WeightError, QGuardError) as error:
            raise not_loaded(error) from error

    @torch.no_grad()
    def _mend(self, model: nn.Module) -> None:
        """Clip in the full-precision model what will be clipped on the way to the quantizer: symbols are to be chosen
        for the same weights, and samples to see them."""
        if self._config.outlier_threshold is None:
            return
        for name, parameter in model.named_parameters():
            if name in self._expected and not parameter.is_meta:
                module, format = self._format(model, name)
                transposed = isinstance(module, Conv1D)
                weight, clipped = self._clip(parameter.data.T if transposed else parameter.data, format, name)
                parameter.data = weight.T if transposed else weight
                self._mended[name] = clipped
        self._rescale_norms(model)

    def _rescale_norms(self, model: nn.Module) -> None:
        """The other half of what `_clip` does to the weights that are quantized."""
        for name in self._rescalings.keys() - self._expected:
            parameter = model.get_parameter(name)
            if parameter.is_meta:
                raise QGuardError(
                    f"the model was not loaded: {name} must be rescaled to undo planted outliers, and is offloaded; "
                    "load the model without offloading, or with clip_outliers=None"
                )
            for rescaling in self._rescalings[name]:
                parameter.data.copy_(rescaling.apply(parameter.data))

    def _randomize(self, model: nn.Module, name: str, value: Tensor) -> Tensor:
        module, format = self._format(model, name)
        weight, clipped = self._clip(value.T if self._backend.is_transposed(module) else value, format, name)
        drawn, method = self._draw(weight, format, name)
        self._tensors[name] = TensorReport(
            name=name,
            format=str(format),
            method=method,
            amplitude=drawn.amplitude,
            weights=weight.numel(),
            share_changed=drawn.share_changed,
            sampled=drawn.sampled,
            clipped=max(clipped, self._mended.get(name, 0)),  # in place, if it was mended already
            rescaled=rescaled_channels(self._rescalings.get(name, ())),
        )
        return drawn.weight.T if self._backend.is_transposed(module) else drawn.weight

    def _draw(self, weight: Tensor, format: Format, name: str) -> tuple[Draw, Method | Literal["compensated"]]:
        dtype = self._backend.handover_dtype(self._inner, weight)
        codes = None if self._prerounding is None else self._prerounding.codes(name, weight)
        if codes is not None:
            return hand_over(weight, format, codes, dtype=dtype, name=name), "compensated"
        method, per_cell = self._config.method_for(
            known=self._backend.exact and not self._backend.calibrates and format.fixed_for(weight.dtype),
            estimated=not self._backend.exact,
        )
        # Per layer and per cell there is none yet: `draw` takes half-widths of its own.
        base = self._global_amplitude if isinstance(self._config.noise, str) else float(self._config.noise)
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
        return module, self._backend.format_of(self._inner, module, name)

    def _half_width(self, model: nn.Module, name: str, value: Tensor) -> float:
        module, format = self._format(model, name)
        weight, _ = self._clip(value.T if self._backend.is_transposed(module) else value, format, name)
        return half_width(weight, format, name)

    def _clip(self, weight: Tensor, format: Format, name: str) -> tuple[Tensor, int]:
        for rescaling in self._rescalings.get(name, ()):
            weight = rescaling.apply(weight)
        threshold = self._config.outlier_threshold
        return (weight, 0) if threshold is None else clip_outliers(weight, format, threshold, self._scratch)

    def _report(self, model: Any) -> GuardReport:
        return GuardReport(
            model=str(model.name_or_path),
            revision=getattr(model.config, "_commit_hash", None),
            method=self._config.method,
            noise=self._config.noise,
            multiplier=self._config.multiplier,
            seed=f"{self._seed:064x}",
            fresh_seed=self._config.seed is None,
            samples=None if self._prerounding is None else self._prerounding.report,
            quantization_config=_json_safe(
                {key: value for key, value in self._inner.to_dict().items() if key not in ("dataset", "tokenizer")}
            ),
            tensors=[self._tensors[name] for name in sorted(self._tensors)],
        )


class _GuardedQuantize(ConversionOps):  # type: ignore[misc]
    def __init__(self, operation: ConversionOps, guard: Guard) -> None:
        self._operation = operation
        self._guard = guard

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> Any:
        return self._guard.convert(
            input_dict, model, lambda tensors: self._operation.convert(tensors, *args, model=model, **kwargs)
        )


class QGuardQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers finds under ``quant_method="qguard"``: the library's own quantizer, with `Guard` on it."""

    def __new__(cls, quantization_config: QGuardConfig, *, pre_quantized: bool = False, **kwargs: Any) -> Any:
        if pre_quantized:
            raise QGuardConfigError(
                "config.json names 'qguard' as its quantization method; a guarded model is saved under its library's "
                "own method, so this file was edited: get the checkpoint from its publisher again"
            )
        backend_of(quantization_config.quantization_config)
        quantizer = build_quantizer(quantization_config.quantization_config, pre_quantized=False, **kwargs)
        Guard(quantization_config, quantizer)
        return quantizer


def register() -> None:
    """Make ``quant_method="qguard"`` known to transformers; again is no error."""
    if QUANT_METHOD in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(QUANT_METHOD)(QGuardConfig)
    register_quantizer(QUANT_METHOD)(QGuardQuantizer)
    merge = AutoHfQuantizer.merge_quantization_configs

    def merge_unless_guarded(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if isinstance(quantization_config_from_args, QGuardConfig):
            found = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
            raise QGuardConfigError(
                f"the model is quantized already ({found.get('quant_method')}), so guard comes too late: guard its "
                "full-precision original, or load it without QGuardConfig"
            )
        return merge(quantization_config, quantization_config_from_args)

    AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_unless_guarded)


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


register()
