"""What a repair refuses, in one line and before anything is trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from repair_models import save_clean
from runs import FAST, TEXT, same
from safetensors.torch import load_file, save_file

from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.repair.errors import RepairError
from optimum_qguard.repair.run import repair_checkpoint


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps is 0; it is at least 1"),
        ({"block_size": 1}, "block size is 1; it is at least 2"),
        ({"block_size": 65}, "block size is 65, and the model reads 64 tokens"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"patience": 0}, "patience is 0; it is at least 1"),
        ({"strength": -1.0}, "strength is -1; it is 0 or more"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"learning_rate": 0.0}, "learning rate is 0"),
        ({"dtype": "float16"}, "dtype is 'float16'; choose one of float32, bfloat16"),
        ({"device": "cuda:7"}, "device is 'cuda:7'"),
        ({"lambda_": 1}, "no option 'lambda_'; there are steps, strength"),
        ({"text": "w2 w3 w4"}, "the text has 3 tokens, and one block needs 32"),
        ({"seed": 2**32}, "seed is 4294967296; it is at most 4294967295"),
        ({"modules": ()}, "modules names none"),
        ({"steps": "20"}, "steps is '20'; it is a whole number"),
        ({"steps": None}, "steps is None; it is a whole number"),
        ({"patience": 2.5}, "patience is 2.5; it is a whole number"),
        ({"learning_rate": "1e-3"}, "learning rate is '1e-3'; it is a number"),
        ({"keep_at": [5, 21]}, "the weights after step 21 are to be kept, but steps are 1 to 20"),
        ({"validation": "w2"}, "the validation text has 1 tokens, and one block needs 32"),
    ],
)
def test_options(options: dict[str, Any], says: str, clean: Path, damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(RepairError) as caught:
        repair_checkpoint(damaged, tmp_path / "out", anchor=clean, **{**FAST, **options})
    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_models(clean: Path, damaged: Path, tmp_path: Path) -> None:
    def altered(config: dict[str, Any] | None = None, without: str = "", **tensors: Any) -> Path:
        folder = tmp_path / "altered"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(damaged, folder)
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**found, **(config or {})}))
        for path in folder.glob(f"{without}*" if without else "none"):
            path.unlink()
        state = {**load_file(folder / "model.safetensors"), **tensors}
        kept = {name: tensor for name, tensor in state.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        return folder

    name = "model.layers.0.mlp.up_proj.weight"
    for alteration, says in [
        ({"config": {"quantization_config": {"quant_method": "gptq"}}}, r"quantized already \(gptq\)"),
        ({"without": "token"}, "has no tokenizer"),
        ({"config": {"hidden_size": "x"}}, "has no tokenizer that transformers can load: .*hidden_size"),
        ({"config": {"hidden_act": "x"}}, "was not loaded as a causal language model"),
        ({"config": {"model_type": "vit"}}, "not loaded as a causal language model"),
        ({name: None}, f"has no tensor {name}"),
        ({"config": {"vocab_size": 100}}, "was not loaded"),
    ]:
        with pytest.raises(RepairError, match=says):
            repair_checkpoint(altered(**alteration), tmp_path / "out", anchor=clean, **FAST)


def test_a_tokenizer_of_another_model(clean: Path, damaged: Path, tmp_path: Path) -> None:
    small = save_clean("llama", tmp_path / "small", vocab_size=50)
    with pytest.raises(RepairError, match="the tokenizer gave token 58, and the model knows 50"):
        repair_checkpoint(small, tmp_path / "out", anchor=None, **FAST)
    low = {**FAST, "text": "w2 w3 w4 w5 " * 50}
    with pytest.raises(RepairError, match="the tokenizer gave token 58, and the model knows 50"):
        repair_checkpoint(small, tmp_path / "out", anchor=None, validation=TEXT, **low)


def test_a_protected_model(clean: Path, damaged: Path, tmp_path: Path) -> None:
    shutil.copytree(damaged, tmp_path / "in")
    (tmp_path / "in" / "qguard.json").write_text('{"kind": "encrypted"}')
    with pytest.raises(RepairError, match="is protected against quantization"):
        repair_checkpoint(tmp_path / "in", tmp_path / "out", anchor=clean, **FAST)


def test_an_anchor_of_another_shape(damaged: Path, tmp_path: Path) -> None:
    other = save_clean("llama", tmp_path / "other", intermediate_size=64)
    with pytest.raises(RepairError, match=r"(gate|up|down)_proj"):
        repair_checkpoint(damaged, tmp_path / "out", anchor=other, **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_outputs(clean: Path, damaged: Path, tmp_path: Path) -> None:
    (tmp_path / "full-5").mkdir()
    (tmp_path / "full-5" / "file").write_text("mine")
    for out, keep_at in [(damaged, []), (tmp_path / "full-5", []), (tmp_path / "full", [5])]:
        with pytest.raises(CheckpointError, match=r"is the input's folder|not empty"):
            repair_checkpoint(damaged, out, anchor=clean, keep_at=keep_at, **FAST)
    repair_checkpoint(damaged, tmp_path / "full", anchor=clean, keep_at=[5], overwrite=True, **{**FAST, "steps": 5})
    assert same(tmp_path / "full", tmp_path / "full-5")
    assert (tmp_path / "full-5" / "file").read_text() == "mine"


def test_the_anchor_is_not_written_over(clean: Path, damaged: Path, tmp_path: Path) -> None:
    """Whoever names it as the output by mistake would lose the only clean copy."""
    for name, out in (("one", "one"), ("two-5", "two")):
        anchor = shutil.copytree(clean, tmp_path / name)
        with pytest.raises(RepairError, match=f"{name}: is the anchor's folder; name another folder"):
            repair_checkpoint(damaged, tmp_path / out, anchor=anchor, keep_at=[5], overwrite=True, **FAST)
        assert same(anchor, clean)
