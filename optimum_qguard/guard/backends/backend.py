"""What guard must know about a quantization library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optimum_qguard.formats import Format


class Backend(ABC):
    """One library that transformers quantizes with.

    A backend is one file in this folder, found by itself; its instance is registered with `register`.

    Attributes:
        quant_methods: ``quant_method`` of the transformers configurations it stands for.
        presets: configurations by the name that ``qguard guard --format`` gives them.
        requirement: the Python package it needs, and the extra of this distribution that installs it (``None``: core).
        exact: whether tests compare the symbols of `format_of` with the library's own. If not, its cells are good
            enough to calibrate noise by, and no more.
        calibrates: whether it quantizes after loading, from calibration data, moving weights itself. Then the loaded
            weights are randomized before it starts.
    """

    quant_methods: ClassVar[tuple[str, ...]]
    presets: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    requirement: ClassVar[tuple[str, str | None]]
    exact: ClassVar[bool] = True
    calibrates: ClassVar[bool] = False

    @abstractmethod
    def format_of(self, config: Any, module: nn.Module, parameter: str) -> Format:
        """What the library will do to a parameter.

        Args:
            config: the transformers configuration.
            module: the module, as the library has prepared it for loading.
            parameter: the parameter's full name.

        Raises:
            QGuardConfigError: it does something that cannot be guarded.
        """

    def check(self, config: Any) -> None:
        """Refuse, before anything is loaded, a configuration that cannot be guarded.

        Raises:
            QGuardConfigError: with the reason.
        """

    def keeps_symbols(self, config: Any) -> bool:
        """Whether a weight that was moved to another point of its grid comes back as that symbol (see
        `Format.keeps_symbols`), so that guard can choose symbols."""
        return self.exact

    def quantizes(self, config: Any, module: nn.Module, parameter: str) -> bool:
        """Whether the library really quantizes a parameter that transformers hands it to quantize."""
        return True

    def is_transposed(self, module: nn.Module) -> bool:
        """Whether the library transposes the module's weight before it quantizes it (``Conv1D``)."""
        return False

    def handover_dtype(self, config: Any, weight: Tensor) -> torch.dtype:
        """The dtype in which the library gets the guarded weight."""
        return weight.dtype

    def modules_to_calibrate(self, config: Any, quantizer: Any, model: nn.Module) -> dict[str, nn.Module]:
        """For a library that calibrates: the modules it will quantize, by name."""
        raise NotImplementedError

    def calibrated_modules(self, model: nn.Module) -> list[str]:
        """For a library that calibrates: the modules that it has quantized, by name."""
        raise NotImplementedError

    def forget_samples(self, quantizer: Any, model: nn.Module) -> None:
        """For a library that calibrates: drop the samples that saving the model would write into its configuration."""
