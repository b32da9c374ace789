"""SmolLM2 still knows what it knew, guarded, saved and loaded again."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_qguard import QGuardConfig, QGuardInt8Config, QGuardNF4Config
from optimum_qguard.evaluate.smollm2 import smollm2_path

pytestmark = pytest.mark.real_model


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (QGuardInt8Config(seed=1), (0.24, 0.26)),
        (QGuardInt8Config(seed=1, method="gaussian"), (0.37, 0.40)),
        (QGuardNF4Config(seed=1), (0.22, 0.27)),
    ],
    ids=["int8", "int8 gaussian", "nf4"],
)
def test_the_capital_of_france(config: QGuardConfig, share: tuple[float, float], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    model = AutoModelForCausalLM.from_pretrained(smollm2_path(), quantization_config=config)
    report = model.qguard_report
    assert len(report.tensors) == 7 * 30
    assert share[0] < report.share_changed < share[1]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert torch.equal(model(**prompt).logits, again(**prompt).logits)
    answer = again.generate(**prompt, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
