"""Choose the symbols of a whole model beforehand, with error feedback, and keep them on disk until the quantizer asks.

The full-precision model is loaded once and sees a few samples; each layer's tensors are rounded when the samples reach
it (`optimum_qguard.guard.second_moments`). Symbols take a byte a weight, in files of a temporary folder that is deleted
with the object.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import tqdm

from optimum_qguard.formats import Format, WeightError, check_finite
from optimum_qguard.guard.compensation import DAMPING, Feedback, feedback, round_compensated
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError
from optimum_qguard.guard.random import RandomStream
from optimum_qguard.guard.samples import LENGTH, SEQUENCES, SamplesReport, generate_samples, tokenize_samples
from optimum_qguard.guard.second_moments import visit_second_moments


class Prerounding:
    """The symbols of one model's tensors.

    Args:
        samples: ``"auto"`` for the model's own generations, or texts.
        seed: of the load.
        damping: see `feedback`.
    """

    def __init__(self, samples: str | Sequence[str], seed: int, damping: float = DAMPING) -> None:
        self._samples = samples
        self._seed = seed
        self._damping = damping
        self._folder = tempfile.TemporaryDirectory(prefix="optimum-qguard-")
        self._asked: set[str] = set()
        self._files: dict[str, Path] = {}
        self._digests: dict[str, bytes] = {}
        self.report: SamplesReport | None = None

    def run(self, model: Any, formats: Mapping[str, Format]) -> None:
        """Choose the symbols of every tensor that the samples reach.

        Args:
            model: in full precision, as `full_precision` loads it.
            formats: what the quantizer will do, by the parameter's name.

        Raises:
            QGuardConfigError: samples that the model cannot have.
            WeightError: NaN or infinite weights.
            QGuardError: a model that cannot be run on the samples, or whose weights do not fit the device.
        """
        self._asked = set(formats)
        layers = {name.removesuffix(".weight"): name for name in formats if _is_linear(model, name)}
        last: tuple[Tensor | None, Feedback | None] = (None, None)
        progress = tqdm(total=len(layers), desc="Rounding with error feedback")

        def visit(layer: str, module: nn.Module, second_moment: Tensor) -> None:
            nonlocal last
            if second_moment is not last[0]:
                last = second_moment, feedback(second_moment, self._damping)
            assert last[1] is not None
            self._round(layers[layer], module, formats[layers[layer]], last[1])
            progress.update()

        for layer, name in layers.items():
            check_finite(model.get_submodule(layer).weight, name)
        try:
            with progress:
                visit_second_moments(model, layers, self._input_ids(model), visit)
        except (QGuardError, QGuardConfigError, WeightError):
            raise
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise QGuardError(
                f"compensate could not run {type(model).__name__} in full precision on samples: "
                f"{' '.join(str(error).split())}"
            ) from error

    def codes(self, name: str, weight: Tensor) -> Tensor | None:
        """The symbols chosen for a tensor, ``(out_features, in_features)`` uint8; ``None`` if no sample reached it (an
        expert that no token was routed to, a tensor that is no linear layer's).

        Raises:
            QGuardError: they were chosen for other weights than ``weight``, or never asked for.
        """
        if name not in self._asked:
            raise QGuardError(f"{name}: is quantized but was not rounded; please report this with the model's name")
        if name not in self._files:
            return None
        if _digest(weight) != self._digests[name]:
            raise QGuardError(f"{name}: other weights are quantized than were rounded; did the checkpoint change?")
        codes: Tensor = load_file(self._files[name])["codes"]
        return codes

    def close(self) -> None:
        """Delete the files."""
        self._folder.cleanup()

    def _input_ids(self, model: Any) -> Tensor:
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
        length = min(LENGTH, most)
        sequences = SEQUENCES * LENGTH // length
        if self._samples == "auto":
            tokens = generate_samples(model, self._seed, sequences, length)
        else:
            tokens = tokenize_samples(self._samples, model, sequences, length).to(model.device)
        kind = "own generations" if self._samples == "auto" else "texts"
        self.report = SamplesReport(kind=kind, sequences=len(tokens), tokens=tokens.numel())
        return tokens

    def _round(self, name: str, module: nn.Module, format: Format, feedback: Feedback) -> None:
        value: Any = module.weight
        if value.is_meta:
            raise QGuardError(
                "compensate runs the model in full precision, which does not fit the device: load with "
                "device_map='cpu', or without compensate"
            )
        weight = value.T if isinstance(module, Conv1D) else value
        codes = round_compensated(weight, format, feedback, RandomStream(self._seed, name), name=name)
        self._files[name] = Path(self._folder.name) / f"{len(self._files)}.safetensors"
        save_file({"codes": codes}, self._files[name])
        self._digests[name] = _digest(weight)


def full_precision(model: Any, files: Sequence[str] | None, dtype: torch.dtype, device_map: Any) -> Any:
    """The model that a skeleton's checkpoint holds, not quantized.

    Args:
        model: the skeleton, of transformers.
        files: of its checkpoint, safetensors.
        dtype: of the weights.
        device_map: as for ``from_pretrained``.

    Raises:
        QGuardConfigError: other files than safetensors.
    """
    from safetensors import safe_open

    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise QGuardConfigError("compensate reads the checkpoint twice and needs it in safetensors files")
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            state.update({key: tensors.get_tensor(key) for key in tensors.keys()})  # noqa: SIM118
    loaded = type(model).from_pretrained(None, config=config, state_dict=state, dtype=dtype, device_map=device_map)
    loaded.name_or_path = model.name_or_path
    return loaded


def _is_linear(model: Any, name: str) -> bool:
    try:
        module = model.get_submodule(name.removesuffix(".weight"))
    except AttributeError:  # experts that the library takes apart
        return False
    return name.endswith(".weight") and isinstance(module, (nn.Linear, Conv1D))


def _digest(weight: Tensor) -> bytes:
    data: Any = weight.detach().contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.sha256(data).digest()
