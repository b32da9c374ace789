"""Which tensors of a checkpoint a quantizer will quantize, and what it will do to each: by name and shape, before
anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optimum_qguard.checkpoint import CheckpointReader, TensorInfo
from optimum_qguard.checkpoint.spelling import spellings
from optimum_qguard.formats import Format, format_names, get_format
from optimum_qguard.formats.gguf_mixture import FILE_TYPES, ModelShape, gguf_name, tensor_type
from optimum_qguard.guard.architecture import skeleton
from optimum_qguard.guard.backends import backend_of, preset, preset_names
from optimum_qguard.guard.errors import QGuardConfigError, QGuardError

_GGUF = "gguf-"


@dataclass(frozen=True)
class Target:
    """A tensor that will be quantized.

    Attributes:
        name: in the checkpoint.
        format: what the quantizer will do to it.
        transposed: whether the checkpoint holds it as ``(in_features, out_features)`` (``Conv1D``).
        weights: how many weights it has.
    """

    name: str
    format: Format
    transposed: bool
    weights: int

    @property
    def format_name(self) -> str:
        """The format's registered name, or its description."""
        return next((name for name in format_names() if get_format(name) == self.format), str(self.format))

    def oriented(self, tensor: Tensor) -> Tensor:
        """From how the checkpoint holds it to how the quantizer sees it, and back (a view)."""
        return tensor.T if self.transposed else tensor


def checkpoint_formats() -> list[str]:
    """What a full-precision checkpoint can be noised for: GGUF file types and the formats, sorted."""
    plain = [name for name in format_names() if not name.startswith(_GGUF)]
    return sorted([*plain, *(f"{_GGUF}{name}" for name in FILE_TYPES)])


def known_formats() -> list[str]:
    """Everything that `find_targets` knows, sorted."""
    return sorted({*checkpoint_formats(), *preset_names()})


def find_targets(reader: CheckpointReader, format: str) -> dict[str, Target]:
    """The tensors that will be quantized, by name, in the checkpoint's order.

    Args:
        reader: a full-precision checkpoint.
        format: a library's preset (``bnb-int8``): every linear layer but the output head. A GGUF file type
            (``gguf-q4_k_m``): what llama.cpp quantizes, embeddings included, each with the type that llama.cpp gives
            it. Any other format: every linear layer and expert but the output head.

    Raises:
        QGuardConfigError: unknown format, or its library is not installed.
        QGuardError: an architecture or a tensor that is not known, or nothing to quantize.
        WeightError: a tensor that the quantizer refuses.
    """
    if format.startswith(_GGUF):
        found = _gguf_targets(reader, format)
    elif format in preset_names():
        config = preset(format)
        backend = backend_of(config)
        found = {
            name: Target(name, backend.format_of(config, module, name), isinstance(module, Conv1D), info.n_elements)
            for name, info, module in _linear_tensors(reader)
        }
    elif format in format_names():
        one = get_format(format)
        found = {
            name: Target(name, one, isinstance(module, Conv1D), info.n_elements)
            for name, info, module in _linear_tensors(reader)
        }
    else:
        raise unknown_format(format)
    if not found:
        raise QGuardError(f"{reader.folder}: {format} quantizes none of its tensors, so there is nothing to guard")
    return found


def unknown_format(format: str) -> QGuardConfigError:
    """The error for a format that does not exist; it lists the known ones."""
    return QGuardConfigError(f"unknown format {format!r}; known: {', '.join(known_formats())}")


class _Modules:
    """Finds the module of a checkpoint's tensor, whether or not the name has the base model's prefix."""

    def __init__(self, model: Any) -> None:
        self._by_name: dict[str, nn.Module] = dict(model.named_modules())
        self._model = model

    def of(self, tensor: str) -> nn.Module | None:
        stem = tensor.rpartition(".")[0]
        return next((self._by_name[name] for name in spellings(stem, self._model) if name in self._by_name), None)


def _linear_tensors(reader: CheckpointReader) -> list[tuple[str, TensorInfo, nn.Module]]:
    model = skeleton(reader)
    modules, head = _Modules(model), model.get_output_embeddings()
    found: list[tuple[str, TensorInfo, nn.Module]] = []
    for name, info in reader.tensors.items():
        if len(info.shape) not in (2, 3) or not info.dtype.is_floating_point:
            continue
        module = modules.of(name)
        # What the skeleton has under another name (experts that are merged on loading) counts as linear: a tensor too
        # many costs a little noise, a tensor too few would go unguarded.
        unknown = module is None and name.endswith(".weight")
        linear = isinstance(module, (nn.Linear, Conv1D)) and module is not head and name.endswith(".weight")
        if linear or unknown or ".experts." in name:
            found.append((name, info, nn.Linear(1, 1, device="meta") if module is None else module))
    return found


def _gguf_targets(reader: CheckpointReader, format: str) -> dict[str, Target]:
    if format.removeprefix(_GGUF).lower() not in {*FILE_TYPES, "q3_k", "q4_k", "q5_k"}:
        raise unknown_format(format)
    model = skeleton(reader)
    modules = _Modules(model)
    try:
        names = {name: gguf_name(name) for name in reader.tensors}
    except ImportError as error:
        raise QGuardConfigError(str(error)) from error
    shape = _shape(model.config, tied="output.weight" not in names.values())
    found = {}
    for name, info in reader.tensors.items():
        if len(info.shape) < 2 or not info.dtype.is_floating_point:
            continue
        converted = names[name]
        if converted is None:
            raise QGuardError(
                f"{reader.folder}: llama.cpp's tables do not know the tensor {name}, so what becomes of it is not known"
            )
        transposed = isinstance(modules.of(name), Conv1D)
        kind = tensor_type(format, converted, info.shape[::-1] if transposed else info.shape, shape)
        if kind is not None:
            found[name] = Target(name, get_format(kind), transposed, info.n_elements)
    return found


def _shape(config: Any, *, tied: bool) -> ModelShape:
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    key_values = getattr(text, "num_key_value_heads", None) or heads
    experts = [getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    return ModelShape(
        layers=text.num_hidden_layers,
        heads_per_kv=heads // key_values,
        experts=next((count for count in experts if count), 0),
        tied_embeddings=tied,
        falcon=text.model_type == "falcon",
    )
