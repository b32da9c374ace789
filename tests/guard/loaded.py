"""What is asked of a guarded model: that it holds exactly the noise that its report says, everywhere."""

from pathlib import Path
from typing import Any

import torch
from libraries import stored
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_qguard.guard.backends import backend_of
from optimum_qguard.guard.noise import draw
from optimum_qguard.guard.random import RandomStream


def quantized_tensors(model: nn.Module) -> set[str]:
    """Names of the weights that a library has made its own."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
        and (type(module.weight) is not nn.Parameter or not module.weight.is_floating_point())
    }


def assert_guarded_exactly(model: PreTrainedModel, folder: Path, **arguments: Any) -> None:
    """Every quantized tensor holds the symbols that the reported seed draws for its full-precision weight; all others
    are as in the checkpoint. ``arguments`` are `from_pretrained`'s."""
    report = model.qguard_report
    config = model.config.quantization_config
    backend = backend_of(config)
    full = type(model).from_pretrained(folder, dtype=model.dtype, **arguments)
    names = {tensor.name for tensor in report.tensors}
    assert names == quantized_tensors(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in full.named_parameters(remove_duplicate=False):
        if name not in names:
            assert torch.equal(parameters[name], parameter), f"{name} was changed"
    for tensor in report.tensors:
        module = model.get_submodule(tensor.name.removesuffix(".weight"))
        format = backend.format_of(config, module, tensor.name)
        assert tensor.format == str(format)
        weight = full.get_parameter(tensor.name).data
        weight = weight.T if backend.is_transposed(module) else weight
        stream = RandomStream(int(report.seed, 16), tensor.name)
        stochastic = tensor.method == "stochastic"
        drawn = draw(
            weight,
            format,
            tensor.method,
            stream,
            amplitude=tensor.amplitude,
            half_widths=1.0,
            per_cell=tensor.amplitude is None,
            dtype=torch.float32 if stochastic else backend.handover_dtype(config, weight),
        )
        assert drawn.share_changed == tensor.share_changed
        blocks, moved = format.blocks(weight), format.blocks(drawn.weight)
        grid = format.grid(blocks if stochastic else moved)
        chosen = format.encode(moved, grid)
        if stochastic:
            chosen = torch.where(moved == blocks, format.encode(blocks, grid), chosen)
        codes, values = stored(module, format, weight.shape)
        assert torch.equal(codes, format.unblock(chosen, weight.shape).long()), f"{tensor.name}: other symbols"
        decoded = format.unblock(grid.decode(chosen), weight.shape)
        tolerance = 4 * torch.finfo(values.dtype).eps
        torch.testing.assert_close(values.float(), decoded, rtol=tolerance, atol=tolerance * float(weight.abs().max()))
        if stochastic:
            below, _ = grid.neighbour_below(blocks.float())
            distance = format.unblock(chosen - below, weight.shape)
            assert ((distance == 0) | (distance == 1)).double().mean() > 0.97, f"{tensor.name}: no neighbours"
