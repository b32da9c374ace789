"""``qguard guard``: a guarded model on disk, or one clear line and nothing."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

SEED = "1f" * 32


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be spoiled."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_a_guarded_model_loads_with_plain_transformers(qguard: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    (model / "tokenizer_config.json").write_text("{}")
    (model / "README.md").write_text("---\nlicense: mit\n---\n\n# My model\n")
    result = qguard("guard", model, tmp_path / "out", "--format", "bnb-int8", "--seed", SEED)
    assert result.code == 0
    assert result.err == ""
    assert "stochastic" in result.out
    assert SEED in result.out
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "# My model" in card
    assert "quantization-guarded" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["load_in_8bit"]
    code = (
        "import sys; sys.modules['optimum_qguard'] = None\n"
        "from transformers import AutoModelForCausalLM\nimport torch\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(model(torch.tensor([[1, 2, 3]])).logits.isfinite().all().item())"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"


def test_the_same_seed_gives_the_same_model_and_the_report_is_json(
    qguard: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    first = qguard("guard", model, tmp_path / "one", "--format", "bnb-nf4", "--seed", "7", "--json").json
    again = qguard("guard", model, tmp_path / "two", "--format", "bnb-nf4", "--seed", "7", "--json").json
    other = qguard("guard", model, tmp_path / "three", "--format", "bnb-nf4", "--json").json
    assert first["report"]["seed"] == f"{7:064x}"
    assert first["report"]["fresh_seed"] is False
    assert other["report"]["fresh_seed"] is True
    assert first["report"]["tensors"] == again["report"]["tensors"]
    assert first["report"] == json.loads((tmp_path / "one" / "qguard.json").read_text())
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    ("format", "package"),
    [
        ("torchao-int8", "torchao"),
        ("torchao-float8", "torchao"),
        ("torchao-int4", "torchao"),
        ("bnb-fp4", "bitsandbytes"),
    ],
)
def test_every_library_that_can_save(
    qguard: Callable[..., Any], model: Path, tmp_path: Path, format: str, package: str
) -> None:
    pytest.importorskip(package)
    result = qguard("guard", model, tmp_path / "out", "--format", format, "--dtype", "bfloat16", "--method", "gaussian")
    assert result.code == 0
    assert result.err == ""
    assert "gaussian" in result.out
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_noise_of_a_fixed_amplitude(qguard: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    options = ["--method", "uniform", "--noise", "1e-3", "--multiplier", "0.5"]
    report = qguard("guard", model, tmp_path / "out", "--format", "bnb-int8", "--json", *options).json["report"]
    assert {tensor["amplitude"] for tensor in report["tensors"]} == {5e-4}
    assert {tensor["method"] for tensor in report["tensors"]} == {"uniform"}


@pytest.mark.slow
def test_gptq_calibrates_on_a_text(qguard: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{index}": index for index in range(512)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0").save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{index * 7 % 512}" for index in range(4000)))
    result = qguard("guard", model, tmp_path / "out", "--format", "gptq-4", "--group-size", "32", "--dataset", text)
    assert result.code == 0
    assert "error feedback" in result.out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["group_size"] == 32


def test_a_checkpoint_for_llama_cpp(qguard: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    pytest.importorskip("libgguf")
    result = qguard("guard", model, tmp_path / "out", "--format", "gguf-q4_k_m", "--json")
    assert result.err == ""
    kinds = {tensor["name"]: tensor["format"] for tensor in result.json["report"]["tensors"]}
    assert "q5_0" in kinds["model.layers.0.self_attn.q_proj.weight"]
    assert "model.layers.0.input_layernorm.weight" not in kinds
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert not hasattr(loaded.config, "quantization_config")


def test_an_empty_folder_is_taken_and_overwriting_leaves_strangers_alone(
    qguard: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert qguard("guard", model, out, "--format", "bnb-int8").code == 0
    (out / "notes.txt").write_text("mine")
    (out / "pytorch_model.bin").write_text("stale")
    assert qguard("guard", model, out, "--format", "bnb-nf4", "--overwrite").code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "pytorch_model.bin").exists()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


FORMATS = ["bnb-int8", "int8-rowwise"]


@pytest.mark.parametrize("format", FORMATS)
class TestRefused:
    """For a library's format and for a checkpoint noised for one."""

    def test_folder_that_is_not_empty(
        self, refused: Callable[..., str], model: Path, tmp_path: Path, format: str
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        line = refused("guard", model, tmp_path / "out", "--format", format)
        assert "not empty" in line
        assert "--overwrite" in line

    def test_output_that_is_a_file(self, refused: Callable[..., str], model: Path, tmp_path: Path, format: str) -> None:
        (tmp_path / "out").write_text("mine")
        assert "is a file" in refused("guard", model, tmp_path / "out", "--format", format, "--overwrite")

    def test_output_in_the_input(self, refused: Callable[..., str], model: Path, format: str) -> None:
        assert "input" in refused("guard", model, model / "out", "--format", format)
        assert "input" in refused("guard", model, model, "--format", format, "--overwrite")

    def test_quantized_already(self, refused: Callable[..., str], model: Path, tmp_path: Path, format: str) -> None:
        config = json.loads((model / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        (model / "config.json").write_text(json.dumps(config))
        line = refused("guard", model, tmp_path / "out", "--format", format)
        assert "quantized already (bitsandbytes)" in line

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--method", "gaussian", "--noise", "-0.1"], "noise is -0.1"),
            (["--method", "gaussian", "--noise", "nan"], "noise is nan"),
            (["--method", "gaussian", "--noise", "inf"], "noise is inf"),
            (["--noise", "much"], "'per_layer', 'global', 'per_cell' or a number"),
            (["--multiplier", "-1"], "multiplier is -1"),
            (["--multiplier", "nan"], "multiplier is nan"),
            (["--method", "magic"], "auto, stochastic, gaussian, uniform"),
            (["--method", "stochastic", "--noise", "0.1"], "stochastic"),
            (["--seed", "-1"], "seed is -1"),
            (["--seed", "zebra"], "seed is 'zebra'"),
            (["--group-size", "32"], "group"),
            (["--format", "nf4", "--group-size", "0"], "--group-size means nothing for nf4"),
            (["--dataset", "text.txt"], "--dataset"),
        ],
    )
    def test_options_that_make_no_sense(
        self, refused: Callable[..., str], model: Path, tmp_path: Path, format: str, options: list[str], message: str
    ) -> None:
        assert message in refused("guard", model, tmp_path / "out", "--format", format, *options)

    @pytest.mark.parametrize(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "infinite")])
    def test_bad_weights(
        self, refused: Callable[..., str], model: Path, tmp_path: Path, format: str, value: float, word: str
    ) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors = load_file(model / "model.safetensors")
        tensors[name][3, 5] = value
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        line = refused("guard", model, tmp_path / "out", "--format", format)
        assert name in line
        assert word in line
        assert "(3, 5)" in line

    def test_truncated_file(self, refused: Callable[..., str], model: Path, tmp_path: Path, format: str) -> None:
        content = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(content[: len(content) // 2])
        assert "download or copy it again" in refused("guard", model, tmp_path / "out", "--format", format)

    def test_missing_shard(self, refused: Callable[..., str], model: Path, tmp_path: Path, format: str) -> None:
        AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "shards", max_shard_size="200KB")
        next((tmp_path / "shards").glob("model-00002-*")).unlink()
        assert "missing" in refused("guard", tmp_path / "shards", tmp_path / "out", "--format", format)

    def test_no_such_model(self, refused: Callable[..., str], tmp_path: Path, format: str) -> None:
        assert "no such folder" in refused("guard", tmp_path / "none", tmp_path / "out", "--format", format)

    def test_no_space(
        self,
        refused: Callable[..., str],
        model: Path,
        tmp_path: Path,
        format: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert "no space" in refused("guard", model, tmp_path / "out", "--format", format)

    def test_unknown_architecture(self, refused: Callable[..., str], model: Path, tmp_path: Path, format: str) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "architectures": ["NewForCausalLM"]}))
        assert "NewForCausalLM" in refused("guard", model, tmp_path / "out", "--format", format)
        for wrong in ({"hidden_size": "x"}, {"num_attention_heads": 0}, {"vocab_size": -1}, {"hidden_act": "zz"}):
            (model / "config.json").write_text(json.dumps({**config, **wrong}))
            line = refused("guard", model, tmp_path / "out", "--format", format)
            assert "not foreseen" not in line
        (model / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
        assert "unheard-of" in refused("guard", model, tmp_path / "out", "--format", format)


def test_a_disk_that_fills_up_meanwhile(
    refused: Callable[..., str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert "no space left" in refused("guard", model, tmp_path / "out", "--format", "bnb-int8")


def test_an_unknown_format_lists_the_known_ones(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    for format in ("int3", "gguf-q9", "Gguf-q4_0"):
        line = refused("guard", model, tmp_path / "out", "--format", format)
        assert "unknown format" in line
        assert all(name in line for name in ("bnb-int8", "gptq-4", "gguf-q4_k_m", "nf4"))


def test_a_model_that_transformers_cannot_save(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto")
    line = refused("guard", model, tmp_path / "out", "--format", "quanto-int4")
    assert "cannot save" in line
    assert "QGuardConfig(QuantoConfig" in line


def test_a_library_that_is_not_installed(
    refused: Callable[..., str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    monkeypatch.setitem(sys.modules, "libgguf", None)
    assert "pip install 'optimum-qguard[gptq]'" in refused("guard", model, tmp_path / "out", "--format", "gptq-4")
    assert "pip install 'optimum-qguard[gguf]'" in refused("guard", model, tmp_path / "out", "--format", "gguf-q4_k_m")


def test_what_cannot_be_guarded_stochastically(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    options = ["--method", "stochastic"]
    assert "gaussian" in refused("guard", model, tmp_path / "out", "--format", "gguf-q4_k_m", *options)


def test_a_dataset_that_is_no_text(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    (tmp_path / "empty.txt").write_text(" \n")
    for name, message in [("none.txt", "cannot be read"), ("empty.txt", "no text")]:
        arguments = ["guard", model, tmp_path / "out", "--format", "gptq-4", "--dataset", tmp_path / name]
        assert message in refused(*arguments)


@pytest.mark.parametrize("format", ["bnb-nf4", "gguf-q8_0"])
def test_error_feedback(qguard: Callable[..., Any], model: Path, tmp_path: Path, format: str) -> None:
    result = qguard("guard", model, tmp_path / "out", "--format", format, "--compensate", "auto", "--json")
    methods = {tensor["name"]: tensor["method"] for tensor in result.json["report"]["tensors"]}
    assert methods["model.layers.1.mlp.up_proj.weight"] == "compensated"
    assert result.json["report"]["samples"]["kind"] == "own generations"


@pytest.mark.parametrize("format", ["bnb-nf4", "gguf-q8_0"])
def test_error_feedback_that_cannot_be(refused: Callable[..., str], model: Path, tmp_path: Path, format: str) -> None:
    (tmp_path / "text.txt").write_text("some text\n")
    arguments = ["guard", model, tmp_path / "out", "--format", format, "--compensate"]
    assert "cannot be read as text" in refused(*arguments, tmp_path / "none.txt")
    assert "has no tokenizer" in refused(*arguments, tmp_path / "text.txt")
    assert "method 'auto' or 'stochastic'" in refused(*arguments, "auto", "--method", "gaussian")


@pytest.mark.real_model
def test_the_real_model_answers(qguard: Callable[..., Any], tmp_path: Path) -> None:
    libgguf = pytest.importorskip("libgguf")
    from optimum_qguard.evaluate import smollm2_path

    original, out = smollm2_path(), tmp_path / "out"
    report = qguard("guard", original, out, "--format", "gguf-q4_k_m", "--seed", "1", "--json").json["report"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])

    name = "model.layers.7.mlp.gate_proj.weight"
    before, after = (load_file(folder / "model.safetensors")[name].float().numpy() for folder in (original, out))
    stored = [libgguf.quantize_rows(weight, libgguf.GGMLQuantizationType.Q5_0) for weight in (before, after)]
    values = [torch.from_numpy(libgguf.dequantize_rows(rows, libgguf.GGMLQuantizationType.Q5_0)) for rows in stored]
    share = float((values[0] != values[1]).float().mean())
    expected = next(tensor["share_changed"] for tensor in report["tensors"] if tensor["name"] == name)
    assert share == pytest.approx(expected, abs=0.01)
    assert 0.2 < share < 0.3
