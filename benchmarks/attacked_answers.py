"""The runs behind `precision_table.py`: F1 of each question, for each defence, attack and attacker's knowledge.

All defences of a model compute with one nested copy of its weights; what an attacker knows decides what he computes his
gradients on. Runs are kept in the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_qguard.checkpoint import atomic_write
from optimum_qguard.evaluate.cache import cache_folder
from optimum_qguard.evaluate.loading import load_model, load_tokenizer
from optimum_qguard.evaluate.robustness import (
    Question,
    answer_scores,
    attack_questions,
    clean_prompts,
    encode_questions,
    flips,
    pgd,
)
from optimum_qguard.evaluate.squad import Passage
from optimum_qguard.precision.nested import nest
from optimum_qguard.precision.switch import bits, random_bits

TRANSFERRED, ITSELF, ADAPTIVE = "full precision", "the defended model", "all its widths"
KNOWLEDGE = (TRANSFERRED, ITSELF, ADAPTIVE)
CLEAN = "clean"
BATCH, DRAWN_TOGETHER = 64, 4


@dataclass(frozen=True)
class Defence:
    """At which widths a model answers: none is full precision, one is static, several are drawn from.

    Attributes:
        widths: of all nested layers.
        per: what draws, ``"forward"`` or ``"request"``.
    """

    widths: tuple[int, ...] = ()
    per: str = "forward"

    @property
    def is_random(self) -> bool:
        return len(self.widths) > 1

    @property
    def knowledge(self) -> tuple[str, ...]:
        """What attackers of it may use; for a static model its own gradients are those of all its widths."""
        return KNOWLEDGE if self.is_random else KNOWLEDGE[:2] if self.widths else (ITSELF,)


@dataclass(frozen=True)
class Budget:
    """What attackers may spend. See `embedding_pgd` and `hotflip` for what the numbers mean."""

    epsilon: float
    steps: int
    flips: int
    tries: int

    def attack(self, name: str, views: Sequence[Any] = ()) -> Any:
        if name == "PGD":
            return pgd(epsilon=self.epsilon, steps=self.steps, views=views)
        return flips(flips=self.flips, tries=self.tries, views=views)


class Subject:
    """One set of weights: asked under each defence, clean and attacked.

    Args:
        name: for the runs' file names.
        folder: a checkpoint.
        passages: what it is asked.
        budget: the attackers'.
        seed: of all draws.
        max_new_tokens: the longest answer.
        device: where it runs.
    """

    def __init__(
        self, name: str, folder: Path, passages: Sequence[Passage], budget: Budget, *,
        seed: int, max_new_tokens: int, device: str,
    ) -> None:  # fmt: skip
        self.name, self.folder, self.budget = name, folder, budget
        self.seed, self.max_new_tokens, self.device = seed, max_new_tokens, device
        self.tokenizer = load_tokenizer(folder)
        # Neighbours share their draws, and are of similar length for speed.
        self.questions: list[Question] = sorted(
            encode_questions(self.tokenizer, passages), key=lambda question: len(question.prompt)
        )
        self._attacked: dict[tuple[Any, ...], list[Tensor]] = {}

    @cached_property
    def full(self) -> Any:
        return load_model(self.folder, dtype=torch.float32, device=self.device)

    @cached_property
    def nested(self) -> Any:
        return nest(load_model(self.folder, dtype=torch.float32, device=self.device))

    @property
    def groups(self) -> Tensor:
        """Which questions share their draws."""
        return torch.arange(len(self.questions)) // DRAWN_TOGETHER

    def scores(self, defence: Defence, attack: str, knowledge: str) -> Tensor:
        """F1 of each question, (questions,); measured unless it was already.

        Args:
            attack: ``"PGD"``, ``"HotFlip"`` or ``"clean"``.
            knowledge: one of ``defence.knowledge``; of no interest where nobody attacks.
        """
        path = self.run_file(defence, attack, knowledge)
        if not path.exists():
            prompts = self._prompts(defence, attack, knowledge)
            batch_size = DRAWN_TOGETHER if defence.is_random else BATCH
            with self._answering(defence) as model:
                f1, exact = answer_scores(
                    model, self.tokenizer, self.questions, prompts,
                    max_new_tokens=self.max_new_tokens, batch_size=batch_size,
                )  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps({"f1": f1.tolist(), "exact match": exact}).encode())
        return torch.tensor(json.loads(path.read_text())["f1"])

    def run_file(self, defence: Defence, attack: str, knowledge: str) -> Path:
        """Where a run is kept; named after everything that it depends on."""
        settings = {
            "defence": asdict(defence),
            "attack": attack,
            "knowledge": "" if attack == CLEAN else knowledge,
            "budget": {} if attack == CLEAN else asdict(self.budget),
            "questions": [question.prompt for question in self.questions],
            "seed": self.seed,
            "model": [self.folder.name, self.max_new_tokens],
        }
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
        widths = "-".join(map(str, defence.widths)) or "full"
        return runs_folder() / f"{self.name} {widths} {attack} {digest}.json".replace(" ", "_")

    def _answering(self, defence: Defence) -> contextlib.AbstractContextManager[Any]:
        return self._drawing(defence, self.seed)

    @contextlib.contextmanager
    def _drawing(self, defence: Defence, seed: int) -> Any:
        """The model as this defence has it; draws are repeatable, and the attacker's are not the answerer's."""
        if not defence.widths:
            yield self.full
            return
        context: Any = bits(self.nested, defence.widths[0])
        if defence.is_random:
            context = random_bits(self.nested, defence.widths, per=defence.per, seed=seed)
        with context:
            yield self.nested

    def _prompts(self, defence: Defence, attack: str, knowledge: str) -> list[Tensor]:
        if attack == CLEAN:
            return clean_prompts(self.full, self.questions)
        # Gradients need no generation, so drawing per request and per forward are the same to them.
        widths = () if knowledge == TRANSFERRED else defence.widths
        key = (attack, widths, knowledge == ADAPTIVE)
        if key not in self._attacked:
            self._attacked[key] = self._attack(attack, Defence(widths), knowledge)
        return self._attacked[key]

    def _attack(self, attack: str, target: Defence, knowledge: str) -> list[Tensor]:
        views: list[Callable[[], Any]] = []
        if knowledge == ADAPTIVE:
            views = [partial(bits, self.nested, width) for width in target.widths]
        context = contextlib.nullcontext(self.nested) if views else self._drawing(target, self.seed + 1)
        with context as model:
            return attack_questions(
                model, self.tokenizer, self.questions, self.budget.attack(attack, views), batch_size=BATCH
            )


def runs_folder() -> Path:
    """Where runs are kept."""
    return cache_folder() / "precision-table"


def forget_runs() -> None:
    """Measure everything anew."""
    shutil.rmtree(runs_folder(), ignore_errors=True)
