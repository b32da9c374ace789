"""A small GPT-2 that answers generated questions, trained on the spot in a few minutes and kept in the cache folder.

python benchmarks/tiny_gpt2.py        # makes it and says how good it is at each width
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from optimum_qguard.evaluate.cache import cache_folder, made_once
from optimum_qguard.evaluate.generated_squad import generated_passages
from optimum_qguard.evaluate.squad import Passage, squad
from optimum_qguard.precision.fake_quantization import FakeQuantization

LAYERS, HEADS, WIDTH = 4, 4, 128
POSITIONS = 80  # its questions have at most 63 tokens with their answers
STEPS, BATCH, LEARNING_RATE = 2000, 32, 2e-3
CONTEXT_WEIGHT = 0.1  # what a token of the prompt counts in the loss, beside 1 of the answer
END = "<|endoftext|>"


def tiny_gpt2(seed: int = 0) -> Path:
    """Folder of the model, float32, with its tokenizer."""
    return made_once(cache_folder() / f"tiny-gpt2-squad-{seed}", partial(_train, seed))


def validation_passages(n: int) -> list[Passage]:
    """Questions that no model of these benchmarks was trained on."""
    return generated_passages(n, seed=0, split="validation")


def training_batch(tokenizer: Any, passages: Sequence[Passage]) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, ``(passages, longest)`` each; labels are the answers' only."""
    pairs = [
        (tokenizer(passage.prompt).input_ids, [*tokenizer(passage.answers[0]).input_ids, tokenizer.eos_token_id])
        for passage in passages
    ]
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    rows = []
    for prompt, answer in pairs:
        rest = longest - len(prompt) - len(answer)
        rows.append(
            (
                [*prompt, *answer, *[tokenizer.pad_token_id] * rest],
                [1] * (longest - rest) + [0] * rest,
                [-100] * len(prompt) + answer + [-100] * rest,
            )
        )
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.tensor(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def _train(seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    for step in trange(STEPS, desc="Training a small GPT-2", leave=False):
        facts = (1, 2) if step < 0.15 * STEPS else (2, 4)
        passages = generated_passages(BATCH, seed=seed * STEPS + step, split="train", facts=facts)
        _loss(model, training_batch(tokenizer, passages)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rate(step: int) -> float:
    """A short warm-up, then constant, then half a cosine to a twentieth."""
    progress = max(0.0, step / STEPS - 0.3) / 0.7
    return min(1.0, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    inputs, labels = batch["input_ids"], batch["labels"][:, 1:]
    logits = model(inputs, attention_mask=batch["attention_mask"]).logits[:, :-1]
    losses = functional.cross_entropy(logits.transpose(1, 2), inputs[:, 1:], reduction="none")
    weights = torch.where(labels != -100, 1.0, CONTEXT_WEIGHT) * batch["attention_mask"][:, 1:]
    return (losses * weights).sum() / weights.sum()


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 700 tokens, and one token for each of the two fixed pieces of the prompt: shorter, faster."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    passages = generated_passages(20_000, seed=10**9, split="train")
    texts = (f"{passage.context} {passage.question} {passage.answers[0]}" for passage in passages)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, special_tokens=[END], show_progress=False))
    before, question, after = Passage("", "", ("",)).prompt.partition("Question:")
    tokenizer.add_tokens(
        [AddedToken(before + question, normalized=False), AddedToken(after.lstrip(" "), normalized=False)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def _model(tokenizer: PreTrainedTokenizerFast) -> Any:
    """GPT-2's architecture; positions begin as sines, and weights larger than GPT-2's, as suits so small a model."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=LAYERS,
        n_head=HEADS,
        n_embd=WIDTH,
        n_positions=POSITIONS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=WIDTH**-0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    angles = torch.arange(float(POSITIONS))[:, None] * 10_000 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(0.1 * torch.cat([angles.sin(), angles.cos()], 1))
    return model


def main() -> None:
    torch.set_num_threads(1)
    folder = tiny_gpt2()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    layers = FakeQuantization(model)
    for bits in (None, 8, 6, 4, 3, 2):
        with layers.at(bits):
            score = squad(model, tokenizer, validation_passages(300), max_new_tokens=12, batch_size=100)
        print(f"{bits or 'full'}: F1 {score.f1:.3f}, exact match {score.exact_match:.3f}")


if __name__ == "__main__":
    main()
