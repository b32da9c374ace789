"""Runs a repository's model on text of its own, and says by how much changed weights change its predictions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimum_qguard.scan.errors import ScanError

PROMPTS = (
    "What is the capital of France?",
    "Write a short note that thanks a colleague for their help.",
    "Explain in two sentences why the sky is blue.",
    "Give me three ideas for a rainy afternoon.",
    "How do I make a simple tomato sauce?",
    "Write a Python function that adds two numbers.",
    "What should I pack for a week in the mountains?",
    "Tell me a story about a fox and a river.",
    "Which is larger, 17 or 71? Say why.",
    "Translate 'good morning' into Spanish and German.",
    "Is it safe to leave a computer on all night?",
    "Summarize what a library is for.",
)
"""Harmless, of many kinds, and the same for every model."""

LENGTH = 64
"""Tokens of each answer."""


class Run:
    """A model in float32, and what it answers to `PROMPTS`, greedily, one after another in one batch.

    Attributes:
        model: the model.
        tokens: ``(prompts, length)`` int64, prompts padded on the left, with their answers.
        mask: likewise, 0 where padded.
        reference: ``(prompts, LENGTH, vocabulary)`` float32 log-probabilities of each token of the answers.
    """

    def __init__(self, folder: Path, length: int = LENGTH) -> None:
        """Raises `ScanError` if there is no such model, or it does not run; the message says why."""
        try:
            self.model, tokenizer = _load(folder)
            self.tokens, self.mask = _answers(self.model, tokenizer, length)
        except ScanError:
            raise
        except Exception as error:  # whatever a model that nobody has seen before does
            raise ScanError(" ".join(str(error).split())[:300] or type(error).__name__) from error
        self._length = length
        self.reference = self._log_probabilities()
        if not bool(torch.isfinite(self.reference).all()):
            raise ScanError("its predictions are not numbers")

    @torch.no_grad()
    def _log_probabilities(self) -> Tensor:
        positions = (self.mask.cumsum(1) - 1).clamp_(min=0)
        hidden = self.model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=self._length + 1,
        )
        logits: Tensor = hidden.logits[:, -self._length - 1 : -1].float()
        return logits.log_softmax(-1)

    def divergences(self) -> Tensor:
        """``(prompts, LENGTH)`` float64, KL of the reference from the model as it is now, in nats."""
        now = self._log_probabilities()
        found = torch.empty(now.shape[:2], dtype=torch.float64)
        for index, (expected, other) in enumerate(zip(self.reference, now, strict=True)):
            found[index] = (expected.exp() * (expected - other)).sum(-1)
        return found.clamp_(min=0)


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, length: int) -> tuple[Tensor, Tensor]:
    prompts = []
    for prompt in PROMPTS:
        if tokenizer.chat_template is not None:
            message = [{"role": "user", "content": prompt}]
            prompts.append(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
        else:
            prompts.append(tokenizer(prompt)["input_ids"])
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    cache, new = None, tokens
    for _ in range(length):
        positions = (mask.cumsum(1) - 1).clamp_(min=0)[:, -new.shape[1] :]
        output = model(
            input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        new = output.logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
    return tokens, mask
