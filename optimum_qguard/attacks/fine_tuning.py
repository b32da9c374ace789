"""Undoing protection against quantization by training: a short fine-tune of the protected checkpoint, as any user would
run it. What survives such training survives what people do to checkpoints anyway.

Powers of two do not change what the model computes, but they change what a step of an optimizer means: AdamW moves
every weight by about the learning rate, whatever the weight's size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from optimum_qguard.attacks.errors import AttackError
from optimum_qguard.checkpoint import open_checkpoint
from optimum_qguard.checkpoint.output import copy_other_files, output_folder


def fine_tune_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    text: str,
    steps: int = 24,
    tokens_per_step: int = 64,
    learning_rate: float = 2e-5,
    overwrite: bool = False,
) -> list[float]:
    """Train all weights on a text in float32 and write them in the checkpoint's own dtype.

    AdamW without weight decay, the learning rate constant, one sequence a step, in the text's order.

    Args:
        model: a folder, or a Hub id with optional ``@revision``.
        out: the output folder.
        text: at least ``steps * tokens_per_step`` tokens of it are needed.
        steps: optimizer steps.
        tokens_per_step: length of a sequence.
        learning_rate: AdamW's; 2e-5 is usual for a full fine-tune.
        overwrite: see `output_folder`.

    Returns:
        The loss of each step, before it, in nats per token.

    Raises:
        AttackError: numbers that are not positive, or a text that is too short.
        CheckpointError: the model cannot be read or the output not written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if steps < 1 or tokens_per_step < 2 or not learning_rate > 0:
        raise AttackError(
            f"{steps} steps of {tokens_per_step} tokens at a learning rate of {learning_rate:g}: needs at least one "
            "step of two tokens, and a positive rate"
        )
    reader = open_checkpoint(model)
    tokens = AutoTokenizer.from_pretrained(reader.folder)(text, return_tensors="pt").input_ids[0]
    needed = steps * tokens_per_step
    if len(tokens) < needed:
        raise AttackError(f"the text has {len(tokens)} tokens, and {steps} steps of {tokens_per_step} need {needed}")
    trained: Any = AutoModelForCausalLM.from_pretrained(reader.folder, dtype="auto")
    dtype = trained.dtype
    trained.float().train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for batch in tokens[:needed].view(steps, 1, tokens_per_step):
        with torch.enable_grad():
            loss = trained(batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with output_folder(out, reader.folder, overwrite=overwrite) as staging:
        copy_other_files(reader, staging)
        trained.to(dtype).save_pretrained(staging)
    return losses
