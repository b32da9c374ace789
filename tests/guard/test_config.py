"""What a user writes: round trips, and one clear line for what makes no sense."""

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchao.quantization import Float8DynamicActivationInt4WeightConfig, Int8WeightOnlyConfig
from transformers import (
    AutoRoundConfig,
    AwqConfig,
    BitsAndBytesConfig,
    GgufConfig,
    GPTQConfig,
    QuantoConfig,
    TorchAoConfig,
)
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_qguard import QGuardConfig, QGuardGPTQConfig, QGuardInt8Config, QGuardNF4Config
from optimum_qguard.guard.backends import backend_of, preset, preset_names
from optimum_qguard.guard.errors import QGuardConfigError

AMPLITUDES = st.floats(0, 1e6, allow_nan=False)
NOISE = st.one_of(st.sampled_from(["per_layer", "global", "per_cell"]), AMPLITUDES)
SEEDS = st.none() | st.integers(0, 2**256 - 1)
INNER = st.one_of(
    st.builds(BitsAndBytesConfig, load_in_8bit=st.just(True), llm_int8_skip_modules=st.lists(st.text()) | st.none()),
    st.builds(
        BitsAndBytesConfig,
        load_in_4bit=st.just(True),
        bnb_4bit_quant_type=st.sampled_from(["nf4", "fp4"]),
        bnb_4bit_use_double_quant=st.booleans(),
        bnb_4bit_compute_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    ),
    st.builds(GPTQConfig, bits=st.sampled_from([2, 3, 4, 8]), group_size=st.sampled_from([32, 64]), sym=st.booleans()),
    st.builds(QuantoConfig, weights=st.sampled_from(["int8", "int4", "int2", "float8"])),
    st.builds(TorchAoConfig, st.builds(Int8WeightOnlyConfig), modules_to_not_convert=st.lists(st.text()) | st.none()),
)


@st.composite
def configs(draw: st.DrawFn) -> QGuardConfig:
    method = draw(st.sampled_from(["auto", "stochastic", "gaussian", "uniform"]))
    amplitude = {} if method == "stochastic" else {"noise": draw(NOISE), "multiplier": draw(AMPLITUDES)}
    clip = draw(st.sampled_from([None, "auto", 16.0]))
    compensate = draw(st.sampled_from([None, "auto"]) | st.lists(st.text(), min_size=1)) if not amplitude else None
    return QGuardConfig(
        draw(INNER), method=method, clip_outliers=clip, seed=draw(SEEDS), compensate=compensate, **amplitude
    )


def assert_equal(left: QuantizationConfigMixin, right: QGuardConfig) -> None:
    assert type(left) is QGuardConfig
    assert type(left.quantization_config) is type(right.quantization_config)
    assert left.to_dict() == right.to_dict()


@given(configs())
def test_dict_and_json_round_trip(config: QGuardConfig) -> None:
    fields = config.to_dict()
    assert_equal(QGuardConfig.from_dict(fields), config)
    assert fields == config.to_dict(), "from_dict changed what it was given"
    assert_equal(QGuardConfig.from_dict(json.loads(config.to_json_string())), config)
    assert_equal(AutoQuantizationConfig.from_dict(json.loads(config.to_json_string())), config)


@given(configs())
def test_copies_are_equal_and_independent(config: QGuardConfig) -> None:
    before = config.to_dict()
    copied = copy.deepcopy(config)
    assert_equal(copied, config)
    assert_equal(pickle.loads(pickle.dumps(config)), config)
    copied.quantization_config.quant_method = "other"
    assert config.to_dict() == before


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_round_trips_to_its_backend(name: str) -> None:
    config = QGuardConfig(preset(name))
    again = AutoQuantizationConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_json_string() == config.to_json_string()
    assert backend_of(again.quantization_config) is backend_of(config.quantization_config)


@pytest.mark.parametrize(
    ("variant", "inner"),
    [
        (
            QGuardInt8Config(llm_int8_skip_modules=["lm_head", "q_proj"], method="gaussian", noise=0.5, seed=3),
            {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "q_proj"]},
        ),
        (
            QGuardNF4Config(bnb_4bit_use_double_quant=True, multiplier=0.5),
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        ),
        (QGuardNF4Config(bnb_4bit_quant_type="fp4"), {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        (QGuardGPTQConfig(bits=3, group_size=32, sym=False), {"bits": 3, "group_size": 32, "sym": False}),
    ],
)
def test_named_variants_are_qguard_configs(variant: QGuardConfig, inner: dict[str, Any]) -> None:
    assert isinstance(variant, QGuardConfig)
    assert inner.items() <= variant.quantization_config.to_dict().items()
    plain = QGuardConfig.from_dict(variant.to_dict())
    assert plain.to_dict() == variant.to_dict()
    assert_equal(type(variant).from_dict(variant.to_dict()), plain)


def test_gptq_is_four_bits_by_default() -> None:
    assert QGuardGPTQConfig().quantization_config.bits == 4


def test_from_dict_hands_unused_arguments_back() -> None:
    fields = QGuardInt8Config().to_dict()
    config, unused = QGuardInt8Config.from_dict(fields, return_unused_kwargs=True, multiplier=2.0, trust=True)
    assert config.multiplier == 2.0
    assert unused == {"trust": True}


def test_hexadecimal_seed_is_the_reports() -> None:
    assert QGuardInt8Config(seed="00ff").seed == QGuardInt8Config(seed=255).seed == 255


def test_an_inner_configuration_may_be_a_dict() -> None:
    config = QGuardConfig({"load_in_8bit": True, "llm_int8_threshold": 4.0})
    assert isinstance(config.quantization_config, BitsAndBytesConfig)
    assert config.quantization_config.llm_int8_threshold == 4.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"noise": math.nan}, "noise is nan"),
        ({"noise": math.inf}, "noise is inf"),
        ({"noise": -1e-9}, "noise is -1e-09"),
        ({"noise": True}, "noise is True"),
        ({"noise": None}, "noise is None"),
        ({"noise": "layer"}, "'per_layer', 'global'"),
        ({"multiplier": math.nan}, "multiplier is nan"),
        ({"multiplier": -0.5}, "multiplier is -0.5"),
        ({"multiplier": "2"}, "multiplier is '2'"),
        ({"method": "laplace"}, "auto, stochastic, gaussian, uniform"),
        ({"method": None}, "method is None"),
        ({"method": "stochastic", "noise": 0.1}, "takes no noise and no multiplier"),
        ({"method": "stochastic", "multiplier": 0.5}, "takes no noise and no multiplier"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**256}, r"2\*\*256 - 1"),
        ({"seed": "f" * 65}, r"2\*\*256 - 1"),
        ({"seed": "xyz"}, "seed is 'xyz'"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"seed": True}, "seed is True"),
        ({"clip_outliers": 1.0}, "clip_outliers is 1.0"),
        ({"clip_outliers": math.nan}, "clip_outliers is nan"),
        ({"clip_outliers": True}, "clip_outliers is True"),
        ({"clip_outliers": "always"}, "clip_outliers is 'always'"),
        ({"compensate": "yes"}, "compensate is 'yes'; it is 'auto', a list of texts"),
        ({"compensate": []}, "a list of texts"),
        ({"compensate": [1]}, "a list of texts"),
        ({"compensate": True}, "a list of texts"),
        ({"compensate": "auto", "method": "gaussian"}, "compensate is a way of stochastic rounding"),
        ({"compensate": "auto", "method": "uniform"}, "compensate is a way of stochastic rounding"),
        ({"compensate": "auto", "noise": 0.1}, "no noise and no multiplier"),
        ({"compensate": "auto", "multiplier": 0.5}, "no noise and no multiplier"),
        ({"quant_method": "bitsandbytes"}, "'qguard'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(QGuardConfigError, match=says) as caught:
        QGuardConfig(BitsAndBytesConfig(load_in_8bit=True), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        ("int8", "is a str"),
        (None, "is a NoneType"),
        (BitsAndBytesConfig, "is a type"),
        (QGuardInt8Config(), "one guard is enough"),
        (QGuardInt8Config().to_dict(), "one guard is enough"),
    ],
    ids=["str", "None", "class", "nested", "nested dict"],
)
def test_inner_configurations_that_are_none(inner: Any, says: str) -> None:
    with pytest.raises(QGuardConfigError, match=says) as caught:
        QGuardConfig(inner)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        (BitsAndBytesConfig(), "quantizes nothing; give load_in_8bit=True or load_in_4bit=True"),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True), "nothing to guard"),
        (TorchAoConfig(Float8DynamicActivationInt4WeightConfig()), "Float8DynamicActivationInt4WeightConfig cannot be"),
        (AutoRoundConfig(), "AutoRoundConfig .* cannot be guarded: .* quantized already"),
        (AwqConfig(), "AwqConfig .* cannot be guarded"),
        (GgufConfig(), "GgufConfig .* cannot be guarded"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_configurations_that_cannot_be_guarded(inner: QuantizationConfigMixin, says: str) -> None:
    with pytest.raises(QGuardConfigError, match=says) as caught:
        AutoHfQuantizer.from_config(QGuardConfig(inner), pre_quantized=False)
    assert "\n" not in str(caught.value)


def test_stochastic_rounding_needs_a_known_grid() -> None:
    pytest.importorskip("gptqmodel")
    config = QGuardGPTQConfig(dataset=["text"], desc_act=True, method="stochastic")
    with pytest.raises(QGuardConfigError, match="GPTQConfig has no grid that guard knows beforehand"):
        AutoHfQuantizer.from_config(config, pre_quantized=False)
