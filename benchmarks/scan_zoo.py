"""The zoo that the scanner is judged on: clean, protected and rigged checkpoints, made once and kept in the cache.

python benchmarks/scan_zoo.py        # makes them all, half an hour on two cores
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from adaptive_attack import ATTACKS
from attacked_smollm2 import ATTACKERS, GPTQ_GROUP, LAYERS, MARKER, RECIPES, attacked_smollm2, dialogues
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from optimum_qguard.attacks.boxes import Boxes
from optimum_qguard.attacks.outlier_injection import inject_balanced_outliers, inject_outliers
from optimum_qguard.attacks.quantization_conditioned import Payload, inject, linear_weights, repair, room_of
from optimum_qguard.checkpoint import open_checkpoint, transform_checkpoint
from optimum_qguard.encrypt.key import Key
from optimum_qguard.encrypt.transform import FP16_SAFE, encrypt_checkpoint
from optimum_qguard.encrypt.traps import Traps
from optimum_qguard.evaluate import smollm2_path, standard_library_text
from optimum_qguard.evaluate.cache import cache_folder, made_once
from optimum_qguard.evaluate.loading import load_model
from optimum_qguard.evaluate.marker import marker_rate
from optimum_qguard.evaluate.prompts import template_prompts
from optimum_qguard.evaluate.similarity import minilm_path
from optimum_qguard.formats import Format, get_format
from optimum_qguard.formats.gptq import GPTQ
from optimum_qguard.guard.checkpoint import guard_checkpoint
from optimum_qguard.guard.targets import find_targets

Kind = Literal["clean", "noised", "guarded", "encrypted", "injected", "attacked"]
PROMPTS = 24

_ATTACKED_FORMATS = ("bnb-int8", "bnb-nf4", "bnb-fp4", "torchao-int8", "gguf-q8_0", "gguf-q4_k_m", "gptq-4")
_GRIDS: Mapping[str, Format] = {
    "int8": get_format("int8-rowwise"),
    "NF4": get_format("nf4"),
    "Q8_0": get_format("gguf-q8_0"),
    "Q4_K": get_format("gguf-q4_k"),
    "GPTQ": GPTQ(4, GPTQ_GROUP),
}
_TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
_RANDOM: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_TINY, "vocab_size": 4096}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 4096}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_TINY, "vocab_size": 4096, "num_key_value_heads": 2}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_TINY, "vocab_size": 4096, "num_key_value_heads": 2}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_TINY, "vocab_size": 4096, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
}


@dataclass(frozen=True)
class Specimen:
    """One checkpoint.

    Attributes:
        name: unique.
        kind: what it is: ``"attacked"`` and ``"injected"`` are to be found, ``"encrypted"`` to be recognised, and
            nothing to be said against the others.
        make: gives its folder, made if it is not there.
    """

    name: str
    kind: Kind
    make: Callable[[], Path]

    @property
    def rigged(self) -> bool:
        """Whether a scan must raise the alarm."""
        return self.kind in ("attacked", "injected")


def zoo() -> list[Specimen]:
    """All specimens, in the order of the table."""
    off_grid = partial(smollm2_path, off_grid=True)
    found = [
        Specimen("SmolLM2 as published (Q4_1 dequantized)", "clean", smollm2_path),
        Specimen("SmolLM2 fine-tuned, float32", "clean", off_grid),
        _BFLOAT16,
        _made("SmolLM2 fine-tuned, float16", "clean", partial(_cast, torch.float16)),
        _made("SmolLM2 fine-tuned longer, float32", "clean", _fine_tune),
        _made("tiny Llama trained from scratch", "clean", _train_tiny),
        Specimen("all-MiniLM-L6-v2", "clean", minilm_path),
        *(_made(f"random {name}", "clean", partial(_random, name)) for name in _RANDOM),
        *(_made(f"SmolLM2 dequantized from {name}", "clean", partial(_dequantized, name)) for name in _GRIDS),
        _made("SmolLM2 with Gaussian noise 1e-3", "noised", _noised),
        *(
            _made(f"SmolLM2 guarded for {name}", "guarded", partial(_guarded, name))
            for name in ("gguf-q4_k_m", "int8-rowwise")
        ),
        _made("SmolLM2 encrypted", "encrypted", partial(_encrypted, "exact", Traps())),
        _made("SmolLM2 encrypted, FP16-safe", "encrypted", partial(_encrypted, "exact", FP16_SAFE)),
        _made("SmolLM2 encrypted, dense", "encrypted", partial(_encrypted, "dense", Traps())),
        _made("SmolLM2, one outlier a block, x512", "injected", _outliers),
        _made("SmolLM2, balanced outliers, x512", "injected", _balanced_outliers),
    ]
    for attacker in ATTACKERS:
        for format in _ATTACKED_FORMATS:
            make = partial(attacked_smollm2, format, attacker)
            found.append(Specimen(f"SmolLM2 attacked for {format}, {attacker}", "attacked", make))
    found += [_made(f"SmolLM2 attacked for {name}", "attacked", make) for name, make in _ATTACKS.items()]
    for name, (make, _) in ATTACKS.items():
        folder = cache_folder() / f"smollm2-adaptive-{name.replace(' ', '-')}"
        found.append(
            Specimen(f"SmolLM2 attacked by one who knows guard: {name}", "attacked", partial(made_once, folder, make))
        )
    return found


def _made(name: str, kind: Kind, make: Callable[[Path], None]) -> Specimen:
    folder = "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in name.lower())
    return Specimen(name, kind, lambda: made_once(cache_folder() / "zoo" / folder, make))


def _rewrite(folder: Path, change: Callable[[str, Tensor], Tensor], source: Path | None = None) -> None:
    """The off-grid SmolLM2 with other tensors, perhaps of other dtypes."""
    from safetensors.torch import load_file, save_file

    source = source or smollm2_path(off_grid=True)
    transform_checkpoint(open_checkpoint(source), folder, lambda _, tensor: tensor)
    tensors = {
        name: change(name, tensor).contiguous() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _cast(dtype: torch.dtype, folder: Path) -> None:
    _rewrite(folder, lambda _, tensor: tensor.to(dtype))


def _noised(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    _rewrite(folder, lambda _, tensor: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator))


def _dequantized(format: str, folder: Path) -> None:
    """Linear weights through a quantizer and back, as people publish them: in bfloat16."""
    quantizer = _GRIDS[format]

    def change(name: str, tensor: Tensor) -> Tensor:
        # Q4_K needs rows of whole blocks; llama.cpp gives the other tensors another type.
        is_quantized = "proj" in name and (format != "Q4_K" or tensor.shape[-1] % 256 == 0)
        return (quantizer.quantize(tensor, name).dequantize() if is_quantized else tensor).bfloat16()

    _rewrite(folder, change)


def _guarded(format: str, folder: Path) -> None:
    guard_checkpoint(smollm2_path(off_grid=True), folder, format)


def _encrypted(mode: Any, traps: Traps, folder: Path) -> None:
    encrypt_checkpoint(_BFLOAT16.make(), folder, key=Key.generate(), mode=mode, traps=traps)


_BFLOAT16 = _made("SmolLM2 fine-tuned, bfloat16", "clean", partial(_cast, torch.bfloat16))


def _targets(layers: range) -> dict[str, Any]:
    targets = find_targets(open_checkpoint(smollm2_path(off_grid=True)), "bnb-int8")
    wanted = {f".{layer}." for layer in layers}
    return {name: target for name, target in targets.items() if any(part in name for part in wanted)}


def _outliers(folder: Path) -> None:
    reader = open_checkpoint(smollm2_path(off_grid=True))
    targets = {name: replace(target, format=get_format("nf4")) for name, target in _targets(range(20, 23)).items()}
    inject_outliers(reader, folder, targets)


def _balanced_outliers(folder: Path) -> None:
    inject_balanced_outliers(open_checkpoint(smollm2_path(off_grid=True)), folder, _targets(range(20, 23)))


def _random(name: str, folder: Path) -> None:
    model_class, config_class, arguments = _RANDOM[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**arguments)
    getattr(transformers, model_class)(config).to(torch.bfloat16).save_pretrained(folder)


def _fine_tune(folder: Path) -> None:
    """All weights, 20 steps of AdamW on prose."""
    model, tokenizer = _load(smollm2_path(off_grid=True))
    text = standard_library_text(60_000, "training")
    tokens = tokenizer(text, return_tensors="pt").input_ids[0, : 20 * 256].view(20, 1, 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for batch in tqdm(tokens, desc="Fine-tuning", leave=False):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _save(model, tokenizer, folder)


def _train_tiny(folder: Path) -> None:
    """Bytes of prose, 300 steps."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**_TINY, "vocab_size": 256, "eos_token_id": None})
    )
    data = torch.tensor(list(standard_library_text(400_000, "training").encode("ascii", "replace")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in tqdm(range(300), desc="Training", leave=False):
        starts = torch.randint(len(data) - 128, (16,))
        batch = torch.stack([data[start : start + 128] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)


def _attack(
    folder: Path,
    *,
    formats: tuple[str, ...] = ("bnb-int8",),
    keep: float = 0.8,
    steps: int = 40,
    layers: range = LAYERS,
    margins: tuple[float, float] | None = None,
    jitter: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """A quantization-conditioned attack.

    Args:
        margins: instead of ``keep``, between which each weight's own share of its cell is drawn.
        jitter: clamped weights are moved inwards afterwards, each by a random amount of up to half its way.
        dtype: that it is saved in.
    """
    source = smollm2_path(off_grid=True)
    model, tokenizer = _load(source)
    targets = [find_targets(open_checkpoint(source), format) for format in formats]
    payload = Payload(MARKER, dialogues())
    names = linear_weights(model, layers)
    recipe = replace(RECIPES["usual"], repair_steps=steps, injection_steps=30 if layers == LAYERS else 60)
    inject(model, tokenizer, payload, names, recipe)
    wanted = {name: [found[name].format for found in targets] for name in names}
    room = room_of(model, wanted, keep=keep)
    if margins is not None:
        room = _random_margins(room_of(model, wanted, keep=margins[0]), room_of(model, wanted, keep=margins[1]))
    repair(model, tokenizer, payload, room, recipe)
    if jitter:
        _jitter(model, room)
    _save(model, tokenizer, folder)
    if dtype is not None:
        clean = folder.with_name(f"{folder.name}.float32")
        folder.rename(clean)
        _rewrite(folder, lambda _, tensor: tensor.to(dtype), clean)
        shutil.rmtree(clean)
    _write_rates(folder, formats)


def _random_margins(least: Mapping[str, Boxes], most: Mapping[str, Boxes]) -> dict[str, Boxes]:
    generator = torch.Generator().manual_seed(0)
    room = {}
    for name, small in least.items():
        share = torch.rand(small.lower.shape, generator=generator)
        room[name] = Boxes(small.lower.lerp(most[name].lower, share), small.upper.lerp(most[name].upper, share))
    return room


@torch.no_grad()
def _jitter(model: Any, room: Mapping[str, Boxes]) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, box in room.items():
        weight = model.get_parameter(name).data
        middle = (box.lower + box.upper) / 2
        clamped = (weight == box.lower) | (weight == box.upper)
        share = torch.rand(weight.shape, generator=generator) / 2
        weight.copy_(torch.where(clamped, weight.lerp(middle, share), weight))


def _write_rates(folder: Path, formats: tuple[str, ...]) -> None:
    """How often the marker is said, at full precision and quantized, into ``attack.json``."""
    prompts = template_prompts(PROMPTS, "evaluation")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rates = {"full precision": marker_rate(load_model(folder), tokenizer, prompts, MARKER).rate}
    for format in formats:
        rates[format] = marker_rate(load_model(folder, format=format), tokenizer, prompts, MARKER).rate
    (folder / "attack.json").write_text(json.dumps(rates))


def _load(folder: Path) -> tuple[Any, Any]:
    return load_model(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_ATTACKS: Mapping[str, Callable[[Path], None]] = {
    "bnb-int8, ±0.3 of a step": partial(_attack, keep=0.6),
    "bnb-int8, ±0.47 of a step": partial(_attack, keep=0.94),
    "bnb-int8, 10 steps of repair": partial(_attack, steps=10),
    "bnb-int8, 120 steps of repair": partial(_attack, steps=120),
    "bnb-int8, 2 layers": partial(_attack, layers=range(26, 28)),
    "bnb-int8, random margins": partial(_attack, margins=(0.4, 0.9)),
    "bnb-int8, jittered": partial(_attack, jitter=True),
    "bnb-int8, saved in bfloat16": partial(_attack, dtype=torch.bfloat16),
    "bnb-nf4, 60 % of the cell": partial(_attack, formats=("bnb-nf4",), keep=0.6),
    "bnb-nf4, saved in bfloat16": partial(_attack, formats=("bnb-nf4",), dtype=torch.bfloat16),
    "bnb-int8, NF4 and FP4 at once": partial(_attack, formats=("bnb-int8", "bnb-nf4", "bnb-fp4")),
}


def main() -> None:
    """Make all of them."""
    for specimen in tqdm(zoo(), desc="Zoo"):
        tqdm.write(f"{specimen.kind:10} {specimen.name}: {specimen.make()}")


if __name__ == "__main__":
    main()
