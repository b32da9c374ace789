"""What a model predicts and says, found out when first asked for and kept: several tasks look at the same answers."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.generation import Answer, generate_answers
from optimum_qguard.evaluate.options import Options
from optimum_qguard.evaluate.perplexity import next_token_logits
from optimum_qguard.evaluate.prompts import template_prompts
from optimum_qguard.evaluate.text import standard_library_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WINDOW = 2048
_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer makes of prose


class Behaviour:
    """A model under the options of an evaluation.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        options: the text and the prompts.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.options = options

    @cached_property
    def answers(self) -> list[Answer]:
        """Greedy answers to the prompts."""
        options = self.options
        prompts = options.prompts or template_prompts(options.n_prompts, "evaluation")
        return generate_answers(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
        )

    @cached_property
    def logits(self) -> Tensor:
        """``(n_tokens - 1, vocabulary)`` on the CPU: its predictions of the text."""
        return next_token_logits(self.model, self.tokenizer, self.text, **self.windows)

    @property
    def text(self) -> str:
        """What perplexity is of."""
        if self.options.text is not None:
            return self.options.text
        return standard_library_text(_CHARACTERS_PER_TOKEN * self.options.max_tokens)

    @property
    def windows(self) -> dict[str, int]:
        """``window``, ``stride`` and ``max_tokens``.

        Raises:
            EvaluationError: the model does not take so many tokens, or the text is too short for a window.
        """
        positions = getattr(self.model.config, "max_position_embeddings", None) or _WINDOW
        window = self.options.window or min(_WINDOW, positions)
        if window > positions:
            raise EvaluationError(f"a window of {window} tokens: the model takes {positions}; give a smaller window")
        max_tokens = self.options.max_tokens
        n_tokens = len(self.tokenizer(self.text)["input_ids"])
        if n_tokens < min(window, max_tokens):
            raise EvaluationError(
                f"the text has {n_tokens} tokens, fewer than the window of {window}; "
                "give a longer text or a smaller window"
            )
        return {"window": window, "stride": self.options.stride or max(1, window // 4), "max_tokens": max_tokens}
