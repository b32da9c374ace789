"""Importing the package is all it takes, before or after transformers, and it stays cheap until it is used."""

import subprocess
import sys
from pathlib import Path

import pytest

LOAD = """
import sys
from transformers import AutoModelForCausalLM
config = {"quant_method": "qguard", "seed": 3, "quantization_config": {"load_in_8bit": True}}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
assert len(model.qguard_report.tensors) == 14

import transformers.quantizers.auto as auto
traces = [*map(type, sys.meta_path), type(auto.__loader__), type(auto.__spec__.loader)]
assert not any(trace.__module__.startswith("optimum_qguard") for trace in traces)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import optimum_qguard",
        "import transformers.quantizers.auto as auto; assert 'qguard' not in auto.AUTO_QUANTIZER_MAPPING\n"
        "import optimum_qguard; assert 'qguard' in auto.AUTO_QUANTIZER_MAPPING",
        "from optimum_qguard.guard.quantizer import register; register()",
    ],
    ids=["before", "after", "from within"],
)
def test_a_plain_dict_works_after_the_import_alone(tiny_llama: Path, imports: str) -> None:
    program = [sys.executable, "-c", imports + LOAD, tiny_llama]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_public_names() -> None:
    import optimum_qguard

    for name in optimum_qguard.__all__:
        assert getattr(optimum_qguard, name) is not None
    assert set(optimum_qguard.__all__) <= set(dir(optimum_qguard))
    with pytest.raises(AttributeError, match="'QGuard'"):
        optimum_qguard.QGuard  # noqa: B018
