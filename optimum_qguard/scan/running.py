"""Runs a repository's model on text of its own, and says by how much changed weights change its predictions."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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

LENGTH = 24
"""Tokens of each answer."""


class Run:
    """A model in float32, and what it answers to `PROMPTS`, greedily.

    Attributes:
        model: the model; its weights may be changed in place.
    """

    def __init__(self, folder: Path) -> None:
        """Raises `ScanError` if there is no model that predicts text, or it does not run; the message says why."""
        try:
            self.model, tokenizer = _load(folder)
            self._texts = _answers(self.model, tokenizer)
            self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
            self._reference = [self._log_probabilities(texts) for texts in self._texts]
        except Exception as error:  # whatever a model that nobody has seen before does
            raise ScanError(" ".join(str(error).split())[:300] or type(error).__name__) from error
        if not all(bool(expected.isfinite().any(-1).all()) for expected in self._reference):
            raise ScanError("its predictions are not numbers")

    @torch.no_grad()
    def _log_probabilities(self, texts: Tensor) -> Tensor:
        """``(n, LENGTH, vocabulary)`` of each token of the answers at the end of texts ``(n, length)``."""
        arguments: dict[str, Any] = {"logits_to_keep": LENGTH + 1} if self._keeps else {}
        logits: Tensor = self.model(input_ids=texts, use_cache=False, **arguments).logits
        return logits[:, -LENGTH - 1 : -1].float().log_softmax(-1)

    def divergences(self) -> Tensor:
        """``(prompts, LENGTH)`` float64: KL divergence of the model's predictions at first from those now, in nats.

        Infinite where the model no longer predicts numbers.
        """
        found = []
        for texts, expected in zip(self._texts, self._reference, strict=True):
            terms = expected.exp() * (expected - self._log_probabilities(texts))
            found.append(terms.masked_fill_(expected == -torch.inf, 0).sum(-1).double())
        return torch.cat(found).clamp_(min=0).nan_to_num_(nan=torch.inf)


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **options)
    return model.eval(), tokenizer


@torch.no_grad()
def _answers(model: Any, tokenizer: Any) -> list[Tensor]:
    """The prompts with the model's answers to them, those of one length together, ``(n, length)``."""
    prompts = [_tokens(tokenizer, prompt) for prompt in PROMPTS]
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
    mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
    answers = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        do_sample=False,
        pad_token_id=0,
    )
    by_padding: dict[int, list[Tensor]] = {}
    for pad, answer in zip(padding, answers, strict=True):
        by_padding.setdefault(pad, []).append(answer[pad:])
    return [torch.stack(texts) for texts in by_padding.values()]


def _tokens(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.chat_template is None:
        found = tokenizer(prompt)["input_ids"]
    else:
        message = [{"role": "user", "content": prompt}]
        found = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    if not found:
        raise ScanError("its tokenizer makes no tokens of a prompt")
    return list(found)
