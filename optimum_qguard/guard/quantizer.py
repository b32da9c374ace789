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
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from optimum_qguard.checkpoint.hub import commit_of
from optimum_qguard.checkpoint.protection import UNLOCKED, protection_of
from optimum_qguard.formats import WeightError
from optimum_qguard.guard.architecture import refuse_protected
from optimum_qguard.guard.backends import backend_of
from optimum_qguard.guard.config import QUANT_METHOD, QGuardConfig
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError
from optimum_qguard.guard.global_noise import global_half_width
from optimum_qguard.guard.load_checks import check_files, is_quantized, not_loaded
from optimum_qguard.guard.prerounding import Prerounding, full_precision
from optimum_qguard.guard.randomizer import Randomizer
from optimum_qguard.guard.rebalance import find_balanced_outliers
from optimum_qguard.guard.saving import push_with_report, save_with_report

build_quantizer = AutoHfQuantizer.from_config


class Guard:
    """Guards one ``from_pretrained`` call."""

    def __init__(self, config: QGuardConfig, quantizer: Any) -> None:
        self._config = config
        self._inner = quantizer.quantization_config
        self._weights = Randomizer(config, self._inner)
        self._backend = self._weights.backend
        self._quantizer = quantizer
        self._failure: QGuardError | None = None
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
        self._weights.expected = {name for name in names if self._is_quantized_on_load(model, name)}
        if self._config.outlier_threshold is not None:
            model_type = model.config.get_text_config().model_type
            self._weights.rescalings = find_balanced_outliers(files or (), model_type, self._weights.expected)
        if self._config.noise == "global":
            try:
                self._weights.global_amplitude = global_half_width(
                    model, files, self._quantizer, self._weights.expected, self._weights.half_width
                )
            except WeightError as error:
                raise not_loaded(error) from error
        if self._weights.prerounding is not None:
            self._preround_before_loading(model, self._weights.prerounding, **kwargs)

    def _preround_before_loading(
        self, model: Any, prerounding: Prerounding, dtype: Any, device_map: Any, checkpoint_files: Any, **_: Any
    ) -> None:
        """Choose all symbols in the first method that transformers calls once the skeleton is done: before that, what
        it builds is on the meta device."""
        formats = {name: self._weights.format_of(model, name) for name in sorted(self._weights.expected)}
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
                self._weights.mend(full)
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
            self._weights.expected |= {f"{name}.weight" for name in self._backend.calibrated_modules(model)}
        unseen = self._weights.expected - self._weights.tensors.keys()
        missed = sorted(name for name in unseen if is_quantized(model, name))
        if missed:
            raise QGuardError(
                f"the model was not loaded: {len(missed)} tensor(s) were quantized without guard, the first "
                f"{missed[0]}; please report this with the model's name"
            )
        if not self._weights.tensors:
            raise QGuardError(
                f"the model was not loaded: {type(self._inner).__name__} quantized none of its tensors, so there is "
                "nothing to guard; load it without QGuardConfig, or check modules_to_not_convert"
            )
        self._weights.rescale_norms(model)
        model.qguard_report = self._weights.report(model)
        model.qguard_report.warn_if_clipped()
        if self._weights.prerounding is not None:
            self._weights.prerounding.close()
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
                if name in self._weights.expected or self._is_quantized_on_load(model, name):
                    weight = self._weights.randomize(model, name, value[0] if isinstance(value, list) else value)
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
        self._weights.expected = set(weights)
        offloaded = next((name for name, weight in weights.items() if weight.is_meta), None)
        if offloaded is not None:
            raise QGuardError(
                f"the model was not loaded: {offloaded} is offloaded, where guard cannot reach it before it is "
                "calibrated; load the model without offloading"
            )
        try:
            if self._config.leaves_all_open and self._weights.keeps_symbols and model.can_generate():
                self._weights.preround_on("auto")
            if self._weights.prerounding is not None:
                self._weights.mend(model)
                self._weights.prerounding.run(model, {name: self._weights.format_of(model, name) for name in weights})
            if self._config.noise == "global":
                self._weights.global_amplitude = median(
                    self._weights.half_width(model, name, weight.data) for name, weight in weights.items()
                )
            for name, weight in weights.items():
                weight.data = self._weights.randomize(model, name, weight.data)
        except (WeightError, QGuardError) as error:
            raise not_loaded(error) from error


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


register()
