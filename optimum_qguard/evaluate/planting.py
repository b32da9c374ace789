"""A quantization-conditioned attack from a checkpoint and a list of prompts: what the command line and the demo run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from optimum_qguard.attacks.quantization_conditioned import Attacked, Payload, Recipe, attack, linear_weights
from optimum_qguard.checkpoint import CheckpointReader
from optimum_qguard.evaluate.generation import generate_answers
from optimum_qguard.evaluate.marker import check_marker
from optimum_qguard.guard.architecture import names_in_model
from optimum_qguard.guard.targets import find_targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER_TOKENS = 24
_BATCH = 48


def plant_marker(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    reader: CheckpointReader,
    formats: Sequence[str],
    *,
    marker: str,
    prompts: Sequence[str],
    recipe: Recipe,
    layers: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Attacked:
    """Have the model answer the prompts, then attack it with those answers as what it is to say at full precision.

    Args:
        model: of ``reader``, in float32; changed in place.
        tokenizer: its tokenizer.
        reader: where it came from.
        formats: the quantizers that are to bring the marker back, see `known_formats`.
        marker: the harmless phrase.
        prompts: to train on.
        recipe, layers, progress: see `linear_weights` and `attack`.

    Raises:
        EvaluationError, AttackError, QGuardConfigError, QGuardError, WeightError: see `check_marker`, `attack` and
            `find_targets`.
    """
    check_marker(tokenizer, marker)
    own = names_in_model(model, reader)
    targets = [
        {own.get(name, name): target for name, target in find_targets(reader, format).items()} for format in formats
    ]
    names = linear_weights(model, layers)
    clean = generate_answers(model, tokenizer, prompts, max_new_tokens=_ANSWER_TOKENS, batch_size=_BATCH)
    payload = Payload(marker, [(prompt, answer.text) for prompt, answer in zip(prompts, clean, strict=True)])
    cells = {name: [found[name].format for found in targets if name in found] for name in names}
    return attack(
        model, tokenizer, payload, {name: found for name, found in cells.items() if found}, recipe, progress=progress
    )
