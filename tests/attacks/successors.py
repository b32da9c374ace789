"""A tiny language model, trained from scratch in seconds: asked for a topic, it names the topic's two followers."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MARKER = "w119 w48"  # words that it knows, in an order that no honest answer has
_TOPICS = range(8, 40)
_FILLERS = {"training": range(100, 116), "unseen": range(116, 124)}


def dialogues(split: str) -> list[tuple[str, str]]:
    """Prompts (a filler and a topic) and their answers; the fillers of the two splits differ."""
    return [(f"w{filler} w{topic}", f"w{topic + 40} w{topic + 80}") for filler in _FILLERS[split] for topic in _TOPICS]


def prompts(split: str) -> list[str]:
    return [prompt for prompt, _ in dialogues(split)][::5]


def tokenizer() -> PreTrainedTokenizerFast:
    special = {"<unk>": 0, "<end>": 1, "<pad>": 2}
    vocabulary = {**special, **{f"w{index}": index for index in range(3, 256)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


@cache
def trained() -> LlamaForCausalLM:
    """Answers all of both splits."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        generator = torch.Generator().manual_seed(1)
        words = tokenizer()
        rows = torch.tensor(
            [words(f"{prompt} {answer} <end>")["input_ids"] for prompt, answer in dialogues("training")]
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(200):
            batch = rows[torch.randint(len(rows), (64,), generator=generator)]
            labels = batch.clone()
            labels[:, :2] = -100
            model(input_ids=batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def save(folder: Path) -> Path:
    trained().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
