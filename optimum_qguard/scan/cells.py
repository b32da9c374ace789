"""The quantization cells that weights are looked for in: those of common formats, as far as they differ."""

from __future__ import annotations

from dataclasses import dataclass

SYMMETRIC_GROUPS = (32, 64, 128)
"""Whose 4-bit grids are recognised, although their scale is not that which a quantizer would choose again."""

FINE = 100
"""Steps of formats of 8 bits have more."""


@dataclass(frozen=True)
class Cells:
    """Some formats whose cells are the same, or nearly so.

    Attributes:
        label: for people.
        format: one of them, as `optimum_qguard.formats` calls it.
        block: how many weights share a scale; 0: a row.
        steps: from zero to the greatest magnitude, or from the least to the greatest weight if ``ranged``; 0 for a code
            book or a scale that is searched.
        ranged: whether the scale is set by the range.
        shifted: whether the block's least weight is a symbol; otherwise zero is.
        flat: whether blocks run on from one row to the next.
    """

    label: str
    format: str
    block: int
    steps: float = 0.0
    ranged: bool = False
    shifted: bool = False
    flat: bool = False

    def fits(self, columns: int) -> bool:
        """Whether a tensor with so many columns can have this format."""
        if self.format == "quanto-int4":
            return columns > 128 and self.block == next((g for g in (128, 96, 64) if columns % g == 0), None)
        return columns >= 32 if self.block == 0 else self.flat or columns % self.block == 0


def _affine(block: int) -> tuple[Cells, ...]:
    return (
        Cells(f"4-bit symmetric groups of {block}", "gptq-4", block, 7.5),
        Cells(f"4-bit asymmetric groups of {block}", "torchao-int4", block, 15, ranged=True, shifted=True),
        Cells(f"4-bit groups of {block} with an integer zero point", "gptq-4", block, 15, ranged=True),
    )


CELLS = (
    Cells("int8 rows", "int8-rowwise", 0, 127),
    Cells("int8 rows of torchao", "torchao-int8", 0, 127.5),
    Cells("4-bit symmetric rows", "gptq-4", 0, 7.5),
    Cells("NF4", "nf4", 64, flat=True),
    Cells("FP4", "fp4", 64, flat=True),
    Cells("GGUF Q8_0", "gguf-q8_0", 32, 127),
    Cells("GGUF Q5_0", "gguf-q5_0", 32, 16),
    Cells("GGUF Q5_1", "gguf-q5_1", 32, 31, ranged=True, shifted=True),
    Cells("GGUF Q4_0", "gguf-q4_0", 32, 8),
    *_affine(32),
    *_affine(64),
    *_affine(128),
    Cells("int8 groups of 128", "gptq-8", 128, 127.5),
    Cells("4-bit asymmetric groups of 96", "quanto-int4", 96, 15, ranged=True, shifted=True),
    Cells("GGUF Q4_K", "gguf-q4_k", 256),
    Cells("GGUF Q5_K", "gguf-q5_k", 256),
    Cells("GGUF Q6_K", "gguf-q6_k", 256),
)
"""All that are looked at."""
