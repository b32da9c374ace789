"""Names with and without the base model's prefix."""

from types import SimpleNamespace

from optimum_qguard.checkpoint.spelling import spellings


def test_with_and_without_the_prefix() -> None:
    gpt2 = SimpleNamespace(base_model_prefix="transformer")
    assert spellings("h.0.attn", gpt2) == ("h.0.attn", "transformer.h.0.attn", "h.0.attn")
    assert spellings("transformer.wte", gpt2) == ("transformer.wte", "transformer.transformer.wte", "wte")


def test_no_model_of_transformers_has_one() -> None:
    assert set(spellings("layers.0", object())) - {".layers.0"} == {"layers.0"}
