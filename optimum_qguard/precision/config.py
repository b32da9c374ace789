"""`PrecisionConfig`: load a model with the widths of a bit map, through torchao.

    PrecisionConfig(BitMap.load("map.yaml"))
    QGuardConfig(PrecisionConfig({"*.mlp.down_proj": 8, "*": 4}))

While a model is loaded with it, it becomes torchao's own configuration for each layer, and that is what the model holds
and what is saved: a saved model loads without this package. Written against transformers 5.23.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_qguard.precision.bitmap import BitMap
from optimum_qguard.precision.decoding import GROUP_SIZE, ZeroPoint, check_groups, width_format
from optimum_qguard.precision.errors import PrecisionError

QUANT_METHOD = "qguard-precision"


class PrecisionConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Quantize on load, each linear layer to the width that a bit map gives it.

    Args:
        bitmap: a `BitMap`, or the patterns of one.
        group_size: weights of a row that share a scale; it divides every row. ``None``: one scale per row.
        mapping: ``"symmetric"`` grids, or ``"asymmetric"`` ones with a zero point, which are a little finer and which
            guard can only dither, not round to without bias.
        backend: the library that quantizes and runs the model: ``"torchao"``. It stores every symbol in a byte,
            whatever its width, and quantizes ``nn.Linear`` only.

    Raises:
        PrecisionError: a bit map or another value that makes no sense, or torchao is not installed.
    """

    def __init__(
        self,
        bitmap: BitMap | Mapping[str, int | None] | Iterable[tuple[str, int | None]],
        *,
        group_size: int | None = GROUP_SIZE,
        mapping: ZeroPoint = "symmetric",
        backend: Literal["torchao"] = "torchao",
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise PrecisionError(f"quant_method is {quant_method!r}; a PrecisionConfig has {QUANT_METHOD!r}")
        if backend != "torchao":
            raise PrecisionError(
                f"backend is {backend!r}; a width for each layer needs 'torchao' (other libraries take one for all)"
            )
        if importlib.util.find_spec("torchao") is None:
            raise PrecisionError(
                "the package torchao is not installed; install it with: pip install 'optimum-qguard[torchao]'"
            )
        self.quant_method = QUANT_METHOD
        self.bitmap = bitmap if isinstance(bitmap, BitMap) else BitMap(bitmap)
        self.group_size = group_size
        self.mapping = mapping
        self.backend = backend
        width_format(8, group_size, mapping)

    def to_dict(self) -> dict[str, Any]:
        """All fields, the bit map as a list of pairs: writers of JSON sort the names of objects."""
        return {**self.__dict__, "bitmap": [list(pair) for pair in self.bitmap.patterns]}

    def layers(self, model: nn.Module) -> dict[str, int]:
        """The linear layers that will be quantized and their widths.

        Args:
            model: at full precision; it may be on the meta device.

        Raises:
            PrecisionError: see `BitMap.resolve`; a layer that torchao cannot quantize; or none to quantize.
        """
        found = {name: bits for name, bits in self.bitmap.resolve(model).items() if bits is not None}
        if not found:
            raise PrecisionError("the bit map leaves every layer as it is, so there is nothing to quantize")
        for name in found:
            module = model.get_submodule(name)
            if not isinstance(module, nn.Linear):
                raise PrecisionError(
                    f"{name} is a Conv1D, as in GPT-2, and torchao runs quantized nn.Linear only: give it null, or try "
                    "the bit map with optimum_qguard.precision.decoding.decoded"
                )
            check_groups(name, module, self.group_size)
        return found

    @property
    def library_config(self) -> Any:
        """transformers' configuration of torchao, which does nothing before it knows the model."""
        from torchao.quantization import FqnToConfig
        from transformers import TorchAoConfig

        # Without a list transformers leaves out layers of its own choice; here the bit map says which.
        return TorchAoConfig(FqnToConfig(), modules_to_not_convert=[])

    def configure(self, library_config: Any, model: nn.Module) -> None:
        """Make what `library_config` gave quantize the model's layers.

        Raises:
            PrecisionError: see `layers`.
        """
        from torchao.quantization import FqnToConfig

        layers = self.layers(model)
        by_width = {
            bits: sorted(name for name in layers if layers[name] == bits) for bits in sorted(set(layers.values()))
        }
        # The names of parameters: a module's name would stand for its bias too, which has no groups.
        library_config.quant_type = FqnToConfig(
            {
                f"re:(?:{'|'.join(map(re.escape, names))})\\.weight": self._torchao(bits)
                for bits, names in by_width.items()
            }
        )

    def _torchao(self, bits: int) -> Any:
        import torch
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup

        granularity = PerAxis(0) if self.group_size is None else PerGroup(self.group_size)
        return IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity, MappingType[self.mapping.upper()])


class PrecisionQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers finds under ``quant_method="qguard-precision"``: the library's own quantizer, configured once
    the model's layers are known."""

    def __new__(cls, quantization_config: PrecisionConfig, *, pre_quantized: bool = False, **kwargs: Any) -> Any:
        if pre_quantized:
            raise PrecisionError(
                f"config.json names {QUANT_METHOD!r} as its quantization method, which no saved model has: the file "
                "was edited; get the checkpoint from its publisher again"
            )
        library_config = quantization_config.library_config
        quantizer = AutoHfQuantizer.from_config(library_config, pre_quantized=False, **kwargs)
        preprocess = quantizer.preprocess_model

        def preprocess_model(model: Any, **arguments: Any) -> None:
            if vars(quantizer).get("preprocess_model") is preprocess_model:
                del quantizer.preprocess_model
            quantization_config.configure(library_config, model)
            model.config.quantization_config = library_config
            preprocess(model=model, **arguments)
            for name in quantization_config.layers(model):
                if not quantizer.param_needs_quantization(model, f"{name}.weight"):
                    raise PrecisionError(
                        f"{name}: transformers keeps this layer of a {type(model).__name__} at full precision, but the "
                        "bit map gives it a width; give it null"
                    )

        quantizer.preprocess_model = preprocess_model
        return quantizer


register_quantization_config(QUANT_METHOD)(PrecisionConfig)
register_quantizer(QUANT_METHOD)(PrecisionQuantizer)
