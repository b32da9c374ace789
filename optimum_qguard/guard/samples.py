"""What a model is shown so that its layers' inputs can be measured: its own generations, or a user's texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from optimum_qguard.guard.errors import QGuardConfigError
from optimum_qguard.guard.random import SEED_BYTES

SEQUENCES = 64
LENGTH = 128
LEAST_TOKENS = 256
_DOMAIN = b"optimum-qguard samples 1\0"


class SamplesReport(BaseModel):
    """What was measured on, as the report says it: never the samples themselves.

    Attributes:
        kind: the model's own generations, or texts that the user gave.
        sequences, tokens: how many, tokens over all sequences.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = Field(pattern="^(own generations|texts)$")
    sequences: int = Field(ge=1)
    tokens: int = Field(ge=1)


@torch.no_grad()
def generate_samples(model: Any, seed: int, sequences: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """Sequences that the model itself makes up, sampled at temperature 1 from the token that begins a text (where
    there is none, from a random one each).

    An end of text does not end a sequence: as in pretraining, the next text follows.

    Args:
        model: a causal language model.
        seed: below 2**256; the same gives the same samples.

    Returns:
        ``(sequences, length)`` int64, on the model's device.

    Raises:
        QGuardConfigError: a model that does not generate.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise QGuardConfigError(
            f"{type(model).__name__} does not generate text of its own to measure on; give compensate a list of texts"
        )
    key = hashlib.sha256(_DOMAIN + seed.to_bytes(SEED_BYTES, "big")).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(key[:8], "big"))
    tokens = torch.empty(sequences, length, dtype=torch.long, device=model.device)
    tokens[:, 0] = _first_tokens(model, sequences, generator)
    cache = None
    for position in range(1, length):
        output = model(input_ids=tokens[:, position - 1 : position], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = output.logits[:, -1].float().softmax(-1).cpu()
        tokens[:, position] = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(model.device)
    return tokens


def _first_tokens(model: Any, sequences: int, generator: torch.Generator) -> Tensor:
    config = model.config.get_text_config()
    begin = getattr(config, "bos_token_id", None)
    if isinstance(begin, int) and begin < config.vocab_size:
        return torch.full((sequences,), begin)
    return torch.randint(config.vocab_size, (sequences,), generator=generator)


def tokenize_samples(texts: Sequence[str], model: Any, sequences: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """The texts one after the other, an end-of-text token between them, cut into sequences of one length.

    Args:
        texts: the first ones are used, up to ``sequences * length`` tokens.
        model: whose folder or repository has the tokenizer.

    Returns:
        ``(n, length)`` int64, n at most ``sequences``.

    Raises:
        QGuardConfigError: no tokenizer, or too little text.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name_or_path, revision=getattr(model.config, "_commit_hash", None) or "main"
        )
    except Exception as error:  # a damaged file makes transformers raise anything
        raise QGuardConfigError(
            f"{model.name_or_path}: has no tokenizer that transformers can load, so the texts of compensate cannot be "
            "used; put the tokenizer's files beside the weights, or use compensate='auto'"
        ) from error
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        if len(tokens) >= sequences * length:
            break
    if len(tokens) < LEAST_TOKENS:
        raise QGuardConfigError(
            f"the texts of compensate have {len(tokens)} token(s); at least {LEAST_TOKENS} are needed, and "
            f"{sequences * length} are used"
        )
    length = min(length, len(tokens))
    rows = min(sequences, len(tokens) // length)
    return torch.tensor(tokens[: rows * length]).view(rows, length)
