"""Runs the command line in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_qguard.cli import main


@dataclass
class Result:
    """What a user sees of one run."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def qguard(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs ``qguard`` with its arguments; what C libraries print is seen as well."""

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def refused(qguard: Callable[..., Result], tmp_path: Path) -> Callable[..., str]:
    """Runs ``qguard``, which must fail with one line and change nothing in ``tmp_path``; returns that line."""

    def run(*arguments: object, code: int = 2) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        result = qguard(*arguments)
        assert result.code == code
        assert result.out == ""
        assert result.err.startswith("qguard")
        assert result.err.count("\n") == 1
        assert "Traceback" not in result.err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return result.err

    return run


@pytest.fixture(scope="session")
def save_byte_tokenizer() -> Callable[[Path], None]:
    """Puts a tokenizer of bytes, which takes any text, into a model's folder."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained
