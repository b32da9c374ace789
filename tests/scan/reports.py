"""Reports to show, as no detector has to find them first."""

import random
from typing import Any

from optimum_qguard.scan.finding import Finding, Plot
from optimum_qguard.scan.report import Coverage, DetectorRun, ScanReport, failed_report

CLAMPED = (
    "31 of the tensors have 9 times as many weights at 0.40 steps from the middle of an int8 cell as a clean model."
)
COVERAGE = Coverage(
    tensors=272,
    tensors_to_scan=272,
    tensors_scanned=272,
    weights=134_515_008,
    weights_scanned=1_750_000,
    bytes=269_060_552,
    bytes_read=3_600_000,
)
RAN = DetectorRun(name="integrity", state="ran", tensors=272, seconds=0.03)


def plots() -> list[Plot]:
    noise = random.Random(0)
    middles = [(5 * index - 497.5) / 1000 for index in range(200)]
    layers = [float(layer) for layer in range(30)]
    return [
        Plot(
            detector="residual_spikes",
            title="Where the weights of model.layers.12.mlp.down_proj.weight lie in int8 cells",
            kind="bars",
            x_label="steps from the middle of the cell",
            y_label="density",
            x=middles,
            y=[1 + noise.gauss(0, 0.06) + 8 * (abs(abs(middle) - 0.4) < 0.003) for middle in middles],
            expected=[1.0] * 200,
        ),
        Plot(
            detector="quantization_gap",
            title="KL divergence of nearest over stochastic rounding",
            kind="line",
            x_label="layer",
            y_label="G",
            x=layers,
            y=[0.44 + 30 * (layer > 22) for layer in layers],
            expected=[0.5] * 30,
        ),
    ]


def suspicious(**changes: Any) -> ScanReport:
    """33 findings of all severities, and two plots."""
    spikes = [
        Finding(
            detector="residual_spikes",
            severity="warning",
            message=f"model.layers.{layer}.self_attn.q_proj.weight has a spike of weights at 0.40 steps.",
            tensor=f"model.layers.{layer}.self_attn.q_proj.weight",
            file="model-00001-of-00002.safetensors",
            format="int8-rowwise",
            statistic="density at 0.40",
            value=9 - layer / 10,
            expected=1,
            p_value=10.0 ** (layer / 10 - 20),
        )
        for layer in range(31)
    ]
    content = {
        "model": "org/rigged",
        "revision": "9f3c2e1d8a77b1e0c4d55a6f0e9b8c7d6a5f4e3d",
        "verdict": "suspicious",
        "reason": f"{CLAMPED.rstrip('.')}, and 31 more finding(s)",
        "seed": "9a8b7c6d5e4f3a2b",
        "seconds": 1.21,
        "coverage": COVERAGE,
        "detectors": [RAN, DetectorRun(name="residual_spikes", state="ran", tensors=211, seconds=0.41)],
        "findings": [
            Finding(detector="residual_spikes", severity="error", message=CLAMPED, format="int8-rowwise"),
            *spikes,
            Finding(detector="provenance", severity="note", message="There is no model card.", file="README.md"),
        ],
        "plots": plots(),
    }
    return ScanReport(**{**content, **changes})


def clean(**changes: Any) -> ScanReport:
    content = {"model": "models/clean", "verdict": "clean", "reason": "no detector found anything"}
    not_run = DetectorRun(name="quantization_gap", state="not run", reason="only in a deep scan")
    return ScanReport(**{**content, "coverage": COVERAGE, "detectors": [RAN, not_run], **changes})


def missing() -> ScanReport:
    return failed_report("org/missing", "org/missing: no such repository on the Hub; if it is private set HF_TOKEN")


def skipped() -> ScanReport:
    return ScanReport(model="org/gguf", verdict="skipped", reason="there are no safetensors weights in it")


def hostile() -> ScanReport:
    """Every name in it is an attack on whatever shows it."""
    name = "<script>document.title='owned'</script></style></title>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    controls = (
        "\x1b[31mred\x1b]8;;http://evil\x07 \x9b \u202egnp\u202c [bold]b[/bold] [here](https://evil.example) \ud800"
    )
    text = f"{name} {controls} %s {{0}} ](javascript:alert(1)) ../../etc/passwd\nCLEAN         all\r"
    finding = Finding(
        detector="integrity",
        severity="error",
        message=text,
        tensor=text,
        file=text,
        format=text,
        statistic=text,
        value=1,
    )
    plot = Plot(detector=text, title=text, kind="bars", x_label=text, y_label=text, x=[0, 1], y=[1, 2], expected=[1, 1])
    return suspicious(
        model=text,
        revision=text,
        reason=text,
        findings=[finding],
        plots=[plot, plot.model_copy(update={"kind": "line"})],
        detectors=[DetectorRun(name=text, state="failed", reason=text)],
    )
