"""How a model predicts with the widths of a bit map, and a picture of allocated widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum_qguard.checkpoint.atomic import writing
from optimum_qguard.evaluate.perplexity import Quality, next_token_logits, perplexity_and_kl
from optimum_qguard.guard.plots import check_plot
from optimum_qguard.precision.allocate import Allocation, allocate
from optimum_qguard.precision.bitmap import MAXIMUM, MINIMUM, BitMap
from optimum_qguard.precision.decoding import GROUP_SIZE, ZeroPoint, decoded
from optimum_qguard.precision.kinds import by_kind
from optimum_qguard.precision.sensitivity import Sensitivity

_WINDOW = 512
_STEPS_PER_BIT = 4


class Judge:
    """How far a model with a bit map is from itself, on one text; the same widths are measured once.

    Args:
        model: a causal language model at full precision.
        tokenizer: its tokenizer.
        text: what to predict.
        max_tokens: how many tokens of it.
        group_size, mapping: of the formats (see `optimum_qguard.precision.decoding.width_format`).

    Raises:
        EvaluationError: fewer than two tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        text: str,
        *,
        max_tokens: int,
        group_size: int | None = GROUP_SIZE,
        mapping: ZeroPoint = "symmetric",
    ) -> None:
        window = min(_WINDOW, getattr(model.config, "max_position_embeddings", _WINDOW))
        self._model = model
        self._text = (tokenizer, text)
        self._options: dict[str, Any] = {"max_tokens": max_tokens, "window": window, "stride": window // 2}
        self._formats: dict[str, Any] = {"group_size": group_size, "mapping": mapping}
        self._reference = next_token_logits(model, *self._text, **self._options)
        self._known: dict[tuple[int | None, ...], Quality] = {}

    def quality(self, bitmap: BitMap | None) -> Quality:
        """Perplexity, and divergence from full precision; ``None`` is full precision.

        Raises:
            PrecisionError: see `BitMap.resolve`.
        """
        widths = {} if bitmap is None else bitmap.resolve(self._model)
        key = tuple(widths.values())
        if key not in self._known:
            with decoded(self._model, widths, **self._formats):
                self._known[key] = perplexity_and_kl(self._reference, self._model, *self._text, **self._options)
        return self._known[key]


def plot_allocation(allocation: Allocation, sensitivity: Sensitivity, path: str | Path) -> None:
    """Draw the width of each layer, and the predicted divergence over the budget beside that of uniform widths.

    Args:
        allocation: what to draw.
        sensitivity: what it was made from.
        path: see `check_plot`.

    Raises:
        QGuardConfigError: see `check_plot`.
        CheckpointError: the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    rows = by_kind({layer: bits for layer, bits in allocation.bitmap.patterns if bits is not None})
    columns = sorted({index for layers in rows.values() for index in layers})
    figure = Figure(figsize=(13, max(3.6, 1.6 + 0.32 * len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    nothing = float("nan")
    cells = [[float(layers.get(index, nothing)) for index in columns] for layers in rows.values()]
    image = left.imshow(cells, cmap="viridis", vmin=MINIMUM, vmax=MAXIMUM, aspect="auto")
    for down, row in enumerate(cells):
        for across, bits in enumerate(row):
            if bits == bits:
                colour = "white" if bits < 6 else "black"
                left.text(across, down, f"{bits:.0f}", ha="center", va="center", fontsize=7, color=colour)
    left.set_yticks(range(len(rows)), list(rows))
    left.set_xticks(range(len(columns)), [str(index) for index in columns], fontsize=7)
    left.set_xlabel("layer")
    left.set_title(f"Bits of each layer, {allocation.average_bits:.2f} on average", loc="left")
    figure.colorbar(image, ax=left, ticks=range(MINIMUM, MAXIMUM + 1), pad=0.01)
    budgets = [MINIMUM + step / _STEPS_PER_BIT for step in range((MAXIMUM - MINIMUM) * _STEPS_PER_BIT + 1)]
    right.plot(budgets, [allocate(sensitivity, budget).predicted for budget in budgets], label="allocated")
    uniform = [sensitivity.predict(dict.fromkeys(allocation.widths, bits)) for bits in range(MINIMUM, MAXIMUM + 1)]
    right.plot(range(MINIMUM, MAXIMUM + 1), uniform, "o--", label="uniform")
    right.plot([allocation.average_bits], [allocation.predicted], "*", markersize=14, label="this map")
    right.set_yscale("log")
    right.set_xlabel("average bits")
    right.set_title("Predicted KL divergence (nats per token)", loc="left")
    right.legend()
    with writing(Path(path)):
        figure.savefig(path, dpi=130)
