"""`guard_all`: for people who cannot change the code that loads the model."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer

from optimum_qguard.guard.config import QGuardConfig
from optimum_qguard.guard.quantizer import build_quantizer

_LOADS_ONLY = ("gguf",)


class guard_all:
    """Guard every ``from_pretrained`` that quantizes while loading, in this process.

    As a function it holds until ``close`` is called; as a context manager until the block ends::

        guard_all()

        with guard_all(method="gaussian"):
            pipeline("text-generation", model="org/model", model_kwargs={"quantization_config": config})

    Loading a checkpoint that is quantized already is left alone, there is no rounding to guard. A configuration that
    quantizes and cannot be guarded is refused.

    Args:
        options: those of `QGuardConfig`, without the quantization configuration.

    Raises:
        QGuardConfigError: options that make no sense.
    """

    def __init__(self, **options: Any) -> None:
        from transformers import BitsAndBytesConfig

        QGuardConfig(BitsAndBytesConfig(load_in_8bit=True), **options)
        self._options = options
        self._previous = AutoHfQuantizer.__dict__["from_config"]
        previous = AutoHfQuantizer.from_config

        def from_config(_: type[Any], /, config: Any, *, pre_quantized: bool = True, **kwargs: Any) -> Any:
            if pre_quantized or isinstance(config, QGuardConfig) or _method(config) in (*_LOADS_ONLY, "qguard"):
                return previous(config, pre_quantized=pre_quantized, **kwargs)
            return build_quantizer(QGuardConfig(config, **options), pre_quantized=False, **kwargs)

        AutoHfQuantizer.from_config = classmethod(from_config)

    def close(self) -> None:
        """Go back to what was before."""
        AutoHfQuantizer.from_config = self._previous

    def __enter__(self) -> guard_all:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _method(config: Any) -> str:
    method = config.get("quant_method", "") if isinstance(config, dict) else config.quant_method
    return str(getattr(method, "value", method))
