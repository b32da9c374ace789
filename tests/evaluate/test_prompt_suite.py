"""The suite is what it says, and each prompt is measured by itself."""

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_qguard.evaluate.errors import EvaluationError
from optimum_qguard.evaluate.loading import load_tokenizer
from optimum_qguard.evaluate.perplexity import perplexity
from optimum_qguard.evaluate.prompt_suite import PROMPT_SUITE, prompt_perplexities, suite_categories, suite_prompts
from optimum_qguard.evaluate.smollm2 import smollm2_path


def test_twelve_categories_of_eight_different_prompts() -> None:
    assert len(PROMPT_SUITE) == 12
    assert {len(prompts) for prompts in PROMPT_SUITE.values()} == {8}
    prompts = suite_prompts()
    assert len(set(prompts)) == 96
    pairs = zip(suite_categories(), prompts, strict=True)
    assert all(prompt in PROMPT_SUITE[category] for category, prompt in pairs)


@pytest.mark.real_model
def test_a_prompt_has_15_to_60_tokens() -> None:
    tokenizer = load_tokenizer(smollm2_path())
    lengths = {prompt: len(tokenizer(prompt)["input_ids"]) for prompt in suite_prompts()}
    assert all(15 <= length <= 60 for length in lengths.values()), sorted(lengths.items(), key=lambda item: item[1])


def test_perplexity_prompt_by_prompt(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = suite_prompts()[::24]
    found = prompt_perplexities(model, tokenizer, prompts)
    assert found == [perplexity(model, tokenizer, prompt) for prompt in prompts]
    assert len(set(found)) == 4


def test_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(EvaluationError, match="no prompt"):
        prompt_perplexities(model, tokenizer, [])
    with pytest.raises(EvaluationError, match="at least two"):
        prompt_perplexities(model, tokenizer, ["ok", "x"])
