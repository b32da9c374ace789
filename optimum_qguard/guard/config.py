"""`QGuardConfig`: the one thing a user writes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from transformers import BitsAndBytesConfig, GPTQConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_qguard.formats.outliers import THRESHOLD
from optimum_qguard.guard.errors import QGuardConfigError
from optimum_qguard.guard.noise import Method
from optimum_qguard.guard.random import SEED_BYTES

QUANT_METHOD = "qguard"
METHODS = ("auto", "stochastic", "gaussian", "uniform")
Noise = Literal["per_layer", "global", "per_cell"]
NOISES: tuple[Noise, ...] = ("per_layer", "global", "per_cell")


class QGuardConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Guard the quantization that ``quantization_config`` describes.

    Args:
        quantization_config: any configuration of transformers that quantizes while loading, or its dict form.
        method: how rounding is randomized. ``"stochastic"``: unbiased rounding onto the quantizer's own grid;
            ``"gaussian"`` or ``"uniform"``: noise before the quantizer; ``"auto"``: stochastic where the grid is known
            beforehand, with error feedback where the quantizer calibrates (see ``compensate``); uniform per cell where
            it searches its grid; Gaussian where the cells are an estimate, and where ``noise`` or ``multiplier`` is
            given.
        noise: amplitude of Gaussian (standard deviation) or uniform (half range) noise: ``"per_layer"``, the median
            half-width of each tensor's cells; ``"global"``, the median of those over the model; ``"per_cell"``, the
            half-width of each weight's own cell; or a number in the weights' units.
        multiplier: factor on that amplitude.
        compensate: stochastic rounding with error feedback: each weight's rounding error is pushed onto the weights of
            its row that are still to come, weighted by how the layer's inputs go together; as unbiased as without, and
            at 4 bits about as close to full precision as plain rounding. What the inputs are like is measured on
            ``"auto"``, the model's own generations, or on a list of texts or a ``datasets.Dataset`` with a ``text``
            column (the first 8,192 tokens; kept here as a list, never written into reports or saved models). The
            full-precision model is loaded and run once for that. ``None`` does without, but for GPTQ, for which
            ``"auto"`` is the default.
        clip_outliers: what to do about planted block maxima, which make a grid so coarse that all other weights round
            to zero. ``"auto"`` brings them back to what the rest of their block supports before anything is calibrated,
            and leaves genuine outliers alone (see `optimum_qguard.guard.outliers`); a number does so from that ratio to
            the rest of the block on, instead of 8; ``None`` does nothing.
        seed: ``None`` takes 256 fresh bits from the operating system and records them in the report. A number (or the
            report's hexadecimal string) repeats an experiment; whoever knows it beforehand can plan around the noise.

    Raises:
        QGuardConfigError: a value that makes no sense.
    """

    def __init__(
        self,
        quantization_config: QuantizationConfigMixin | dict[str, Any],
        *,
        method: Literal["auto", "stochastic", "gaussian", "uniform"] = "auto",
        noise: Noise | float = "per_layer",
        multiplier: float = 1.0,
        compensate: Literal["auto"] | Sequence[str] | Any | None = None,
        clip_outliers: Literal["auto"] | float | None = "auto",
        seed: int | str | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise QGuardConfigError(f"quant_method is {quant_method!r}; a QGuardConfig has {QUANT_METHOD!r}")
        self.quant_method = QUANT_METHOD
        self.quantization_config = _inner_config(quantization_config)
        self.method = method
        self.noise = noise
        self.multiplier = multiplier
        self.compensate = _texts(compensate)
        self.clip_outliers = clip_outliers
        self.seed = int(seed, 16) if isinstance(seed, str) and _is_hex(seed) else seed
        self._validate()

    def _validate(self) -> None:
        if self.method not in METHODS:
            raise QGuardConfigError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}")
        if isinstance(self.noise, str):
            if self.noise not in NOISES:
                raise QGuardConfigError(f"noise is {self.noise!r}; choose {', '.join(map(repr, NOISES))} or a number")
        elif not _is_amplitude(self.noise):
            raise QGuardConfigError(f"noise is {self.noise!r}; a fixed amplitude is a finite number, 0 or more")
        if not _is_amplitude(self.multiplier):
            raise QGuardConfigError(f"multiplier is {self.multiplier!r}; it is a finite number, 0 or more")
        if self.method == "stochastic" and self.has_amplitude:
            raise QGuardConfigError(
                "method='stochastic' takes no noise and no multiplier: the grid decides; use 'gaussian' or 'uniform'"
            )
        if self.compensate is not None and (self.method not in ("auto", "stochastic") or self.has_amplitude):
            raise QGuardConfigError(
                "compensate is a way of stochastic rounding: it goes with method 'auto' or 'stochastic', and with no "
                "noise and no multiplier"
            )
        threshold = self.clip_outliers
        if threshold not in (None, "auto") and not (_is_amplitude(threshold) and float(threshold) > 1):
            raise QGuardConfigError(
                f"clip_outliers is {threshold!r}; it is 'auto', None, or how many times larger than the rest of its "
                "block an outlier is (a finite number greater than 1)"
            )
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2 ** (8 * SEED_BYTES)
        ):
            raise QGuardConfigError(
                f"seed is {self.seed!r}; it is a whole number from 0 to 2**256 - 1 (or hexadecimal digits), or None"
            )

    def method_for(self, *, known: bool, estimated: bool) -> tuple[Method, bool]:
        """How a tensor's rounding is randomized, and whether its noise is per cell.

        Args:
            known: whether the quantizer is sure to find the same grid again after pre-rounding.
            estimated: whether its cells are an estimate.
        """
        if self.method != "auto":
            return self.method, self.noise == "per_cell"
        if self.has_amplitude or estimated:
            return "gaussian", self.noise == "per_cell"
        return ("stochastic", False) if known else ("uniform", True)

    @property
    def leaves_all_open(self) -> bool:
        """Whether guard is to choose by itself what suits the quantizer."""
        return self.method == "auto" and not self.has_amplitude and self.compensate is None

    @property
    def has_amplitude(self) -> bool:
        """Whether the user asked for a certain amount of noise, which stochastic rounding does not have."""
        return self.noise != "per_layer" or self.multiplier != 1.0

    @property
    def outlier_threshold(self) -> float | None:
        """From which ratio to the rest of its block on a weight may be planted; ``None`` to leave all alone."""
        if self.clip_outliers is None:
            return None
        return THRESHOLD if isinstance(self.clip_outliers, str) else float(self.clip_outliers)

    def to_dict(self) -> dict[str, Any]:
        """All fields, the quantizer's own configuration nested as its dict; `from_dict` is the inverse."""
        fields = {key: value for key, value in self.__dict__.items() if key != "quantization_config"}
        return {**copy.deepcopy(fields), "quantization_config": self.quantization_config.to_dict()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A `QGuardConfig` of what `to_dict` gave, also where a named variant made it: the variants' own arguments are
        their library's, not these fields."""
        return super(QGuardConfig, QGuardConfig).from_dict(config_dict, return_unused_kwargs, **kwargs)


class QGuardInt8Config(QGuardConfig):
    """`QGuardConfig` for bitsandbytes' LLM.int8(); takes ``BitsAndBytesConfig``'s arguments and guard's."""

    def __init__(self, **arguments: Any) -> None:
        guard, backend = _split(arguments)
        super().__init__(BitsAndBytesConfig(load_in_8bit=True, **backend), **guard)


class QGuardNF4Config(QGuardConfig):
    """`QGuardConfig` for bitsandbytes' NF4; takes ``BitsAndBytesConfig``'s arguments and guard's."""

    def __init__(self, **arguments: Any) -> None:
        guard, backend = _split(arguments)
        backend.setdefault("bnb_4bit_quant_type", "nf4")
        super().__init__(BitsAndBytesConfig(load_in_4bit=True, **backend), **guard)


class QGuardGPTQConfig(QGuardConfig):
    """`QGuardConfig` for GPTQ; takes ``GPTQConfig``'s arguments and guard's."""

    def __init__(self, bits: int = 4, **arguments: Any) -> None:
        guard, backend = _split(arguments)
        super().__init__(GPTQConfig(bits=bits, **backend), **guard)


_GUARD_ARGUMENTS = ("method", "noise", "multiplier", "compensate", "clip_outliers", "seed")


def _split(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    guard = {key: arguments[key] for key in _GUARD_ARGUMENTS if key in arguments}
    return guard, {key: value for key, value in arguments.items() if key not in guard}


def _inner_config(config: QuantizationConfigMixin | dict[str, Any]) -> QuantizationConfigMixin:
    if isinstance(config, dict):
        from transformers.quantizers.auto import AutoQuantizationConfig

        config = AutoQuantizationConfig.from_dict(dict(config))
    if isinstance(config, QGuardConfig):
        raise QGuardConfigError("the configuration is a QGuardConfig already; one guard is enough")
    if not isinstance(config, QuantizationConfigMixin):
        raise QGuardConfigError(
            f"quantization_config is a {type(config).__name__}; give one of transformers' quantization configurations, "
            "for example BitsAndBytesConfig(load_in_8bit=True)"
        )
    return config


def _texts(samples: Any) -> str | list[str] | None:
    """``compensate`` as it is kept: ``None``, ``"auto"`` or a list of texts."""
    if samples is None or (isinstance(samples, str) and samples == "auto"):
        return samples
    if hasattr(samples, "column_names") and "text" in samples.column_names:
        samples = samples["text"]
    texts = [] if isinstance(samples, (str, bytes, dict)) or not isinstance(samples, Iterable) else list(samples)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise QGuardConfigError(
            f"compensate is {samples!r:.80}; it is 'auto', a list of texts, a datasets.Dataset with a 'text' column, "
            "or None"
        )
    return texts


def _is_amplitude(value: object) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(float(value)) and value >= 0
    )


def _is_hex(text: str) -> bool:
    return text.isascii() and bool(text) and all(letter in "0123456789abcdefABCDEF" for letter in text)
