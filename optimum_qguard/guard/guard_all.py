"""`guard_all`: for people who cannot change the code that loads the model."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer

from optimum_qguard.guard.config import QUANT_METHOD, QGuardConfig
from optimum_qguard.guard.quantizer import build_quantizer

_LOADS_ONLY = ("gguf",)
_PLAIN = AutoHfQuantizer.__dict__["from_config"]


class guard_all:
    """Guard every ``from_pretrained`` that quantizes while loading, in this process.

    As a function it holds until ``close`` is called; as a context manager until the block ends::

        guard_all()

        with guard_all(method="gaussian"):
            pipeline("text-generation", model="org/model", model_kwargs={"quantization_config": config})

    Loading a checkpoint that is quantized already is left alone, there is no rounding to guard. A configuration that
    quantizes and cannot be guarded is refused. Where several are open, the last one's options hold.

    Args:
        options: those of `QGuardConfig`, without the quantization configuration.

    Raises:
        QGuardConfigError: options that make no sense.
    """

    _open: ClassVar[list[guard_all]] = []

    def __init__(self, **options: Any) -> None:
        QGuardConfig(BitsAndBytesConfig(load_in_8bit=True), **options)
        self._options = options
        if not self._open:
            AutoHfQuantizer.from_config = classmethod(_from_config)
        self._open.append(self)

    def close(self) -> None:
        """End this guard; again is no error."""
        if self in self._open:
            self._open.remove(self)
            if not self._open:
                AutoHfQuantizer.from_config = _PLAIN

    def __enter__(self) -> guard_all:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _from_config(_: type[Any], /, config: Any, *, pre_quantized: bool = True, **kwargs: Any) -> Any:
    if pre_quantized or isinstance(config, QGuardConfig) or _method(config) in (*_LOADS_ONLY, QUANT_METHOD):
        return build_quantizer(config, pre_quantized=pre_quantized, **kwargs)
    options = guard_all._open[-1]._options
    return build_quantizer(QGuardConfig(config, **options), pre_quantized=False, **kwargs)


def _method(config: Any) -> str:
    method = config.get("quant_method", "") if isinstance(config, dict) else config.quant_method
    return str(getattr(method, "value", method))
