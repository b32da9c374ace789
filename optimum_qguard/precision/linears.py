"""The layers of a model that precision acts on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from optimum_qguard.precision.errors import PrecisionError


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers (``Conv1D`` included) by name, in the model's order, the output head among them; a layer that the
    model uses in several places is there once.

    Raises:
        PrecisionError: no linear layers, or weights that are quantized already.
    """
    from transformers.pytorch_utils import Conv1D

    found = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    if not found:
        raise PrecisionError(f"{type(model).__name__} has no linear layers to give a width")
    for name, module in found.items():
        if type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
            raise PrecisionError(f"{name} is quantized already; take the full-precision model")
    return found


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that predicts tokens, if the model has one."""
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return head


def oriented(module: nn.Module) -> Tensor:
    """The layer's weight as ``(out_features, in_features)`` (a view; ``Conv1D`` holds it transposed)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.data if isinstance(module, nn.Linear) else weight.data.T


def fused_experts(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules that hold the weights of several experts in one ``(experts, …, …)`` parameter: their names, and those
    parameters' full names."""
    for name, module in model.named_modules():
        fused = [
            f"{name}.{each}"
            for each, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3 and min(parameter.shape) > 1
        ]
        if fused:
            yield name, tuple(fused)


def tied_weights(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs of names under which a model has one and the same parameter."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            yield known, name
    # While a model is being loaded, transformers only knows what it will tie.
    yield from ((source, target) for target, source in getattr(model, "all_tied_weights_keys", {}).items())
