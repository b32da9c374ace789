"""Random weights for the tests of formats: many shapes and dtypes, and the contents that quantizers trip over."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from optimum_qguard.formats import Format, WeightError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = st.integers(1, 9)
COLUMNS = st.integers(1, 300)
KINDS = ["normal", "outliers", "ties", "shifted", "one-sided", "constant rows", "zero rows"]


@st.composite
def weights(
    draw: st.DrawFn,
    rows: st.SearchStrategy[int] = ROWS,
    columns: st.SearchStrategy[int] = COLUMNS,
    kinds: list[str] = KINDS,
    dtypes: list[torch.dtype] = DTYPES,
    experts: bool = False,
) -> Tensor:
    shape = (draw(rows), draw(columns))
    if experts:
        shape = (draw(st.integers(1, 3)), *shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(kinds))
    weight = torch.randn(shape, generator=generator)
    if kind == "outliers":
        weight *= torch.randn(shape, generator=generator).exp() ** 2
    elif kind == "ties":
        weight = (weight * 16).round() / 2
    elif kind == "shifted":
        weight += 3 * torch.randn(*shape[:-1], 1, generator=generator)
    elif kind == "one-sided":
        weight = weight.abs() * torch.randn(*shape[:-1], 1, generator=generator).sign()
    elif kind == "constant rows":
        weight[..., ::2, :] = weight[..., ::2, :1].clone()
    elif kind == "zero rows":
        weight[..., ::2, :] = 0
    weight = (weight * draw(st.sampled_from([0.02, 1.0, 30.0]))).clamp(-3e4, 3e4)
    return weight.to(draw(st.sampled_from(dtypes)))


@st.composite
def weights_for(
    draw: st.DrawFn, format: Format, kinds: list[str] = KINDS, dtypes: list[torch.dtype] = DTYPES
) -> Tensor:
    """Odd shapes; whole tiles and groups for a format that takes nothing else."""
    experts = draw(st.booleans())
    weight = draw(weights(kinds=kinds, dtypes=dtypes, experts=experts))
    try:
        format.blocks(weight)
    except WeightError:
        side = st.sampled_from([128, 256])
        weight = draw(weights(side, st.sampled_from([256, 512]), kinds=kinds, dtypes=dtypes, experts=experts))
    return weight


def slack(weight: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """What rounding in the weight's own dtype may move a boundary by."""
    return 4 * torch.finfo(weight.dtype).eps * (weight.float().abs() + abs(offset))
