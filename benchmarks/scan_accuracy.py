"""Is everything found that is rigged, and nothing that is not? Every specimen of the zoo through every detector.

Quick scans are repeated with several samples of the weights. Rates at other thresholds than the scanner's come from the
same evidence, concluded again. Beside the table stands the picture: true against false positive rate for each detector.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, argument_parser, print_table, write
from scan_zoo import Specimen, zoo
from tqdm import tqdm

from optimum_qguard.checkpoint import atomic_write
from optimum_qguard.checkpoint.repository import open_repository
from optimum_qguard.evaluate.cache import cache_folder
from optimum_qguard.scan.detector import ALPHA, Detector
from optimum_qguard.scan.detectors import detector_names, get_detector
from optimum_qguard.scan.finding import Conclusion
from optimum_qguard.scan.scanner import scan
from optimum_qguard.scan.subject import read_subject
from optimum_qguard.scan.work import Result, tasks, work

DEEP = ("quantization_gap",)
ALPHAS = tuple(10.0**-exponent for exponent in (0.3, 1, 2, 3, 4, 6, 9, 12, 20, 40, 80))

Row = dict[str, Any]


def quick(specimen: Specimen, seed: int) -> Row:
    """One quick scan, and which detectors would raise the alarm at each of `ALPHAS`."""
    report = scan(specimen.make(), seed=seed)
    return {
        "verdict": report.verdict,
        "reason": report.reason,
        "protection": report.protection,
        "raised": sorted({finding.detector for finding in report.findings if finding.severity != "note"}),
        "seconds": report.seconds,
        "at alpha": at_alphas(specimen.make(), seed),
    }


def at_alphas(folder: Path, seed: int) -> dict[str, list[bool]]:
    """By detector, whether it raises the alarm at each of `ALPHAS`."""
    repository = open_repository(folder)
    subject = read_subject(repository, seed=seed)
    detectors = [detector for name in detector_names() if not (detector := get_detector(name)).deep]
    result = Result()
    for task in tasks(subject, [detector.name for detector in detectors]):
        result.add(work(task, repository))

    def raises(detector: Detector, alpha: float) -> bool:
        conclusion: Conclusion = detector.conclude(result.evidence[detector.name], subject, alpha)
        return any(finding.severity != "note" for finding in conclusion.findings)

    return {
        detector.name: [raises(detector, alpha) for alpha in ALPHAS]
        for detector in detectors
        if detector.name not in result.failures
    }


def deep(specimen: Specimen, wanted: bool) -> Row | None:
    """One scan that runs the model, kept in the cache: it takes minutes. ``None`` if it was neither made nor wanted."""
    file = cache_folder() / "scan-deep" / f"{specimen.make().name}.json"
    if not file.exists():
        if not wanted:
            return None
        report = scan(specimen.make(), seed=0, deep=True, detectors=DEEP)
        raised = sorted({finding.detector for finding in report.findings if finding.severity != "note"})
        found = {"verdict": report.verdict, "reason": report.reason, "raised": raised, "seconds": report.seconds}
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(found))
    return dict(json.loads(file.read_text()))


def row_of(specimen: Specimen, scans: Sequence[Row], deep_scan: Row | None) -> Row:
    """One line of the table."""
    raised = {detector for scan in scans for detector in scan["raised"]}
    verdicts = sorted({scan["verdict"] for scan in scans})
    return {
        "specimen": specimen.name,
        "kind": specimen.kind,
        "quick scans": len(scans),
        "alarms": sum(bool(scan["raised"]) for scan in scans),
        "verdict": "/".join(verdicts),
        "detectors": ", ".join(sorted(raised)),
        "deep verdict": None if deep_scan is None else deep_scan["verdict"],
        "deep detectors": None if deep_scan is None else ", ".join(deep_scan["raised"]),
        "attack": rates(specimen.make()),
        "reason": scans[0]["reason"],
    }


def rates(folder: Path) -> str | None:
    """How often an attacked specimen says the marker, at full precision and quantized."""
    file = folder / "attack.json"
    if not file.exists():
        return None
    return ", ".join(f"{name} {rate:.0%}" for name, rate in json.loads(file.read_text()).items())


def roc(scans: Iterable[tuple[Specimen, Row]]) -> dict[str, list[tuple[float, float, float]]]:
    """By detector: alpha, share of the scans of harmless specimens that raise the alarm, and of rigged ones."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    pairs = [(specimen, each["at alpha"]) for specimen, each in scans if specimen.kind != "encrypted"]
    for detector in dict.fromkeys(name for _, curves in pairs for name in curves):
        found[detector] = []
        for index, alpha in enumerate(ALPHAS):
            hits = [(specimen.rigged, curves[detector][index]) for specimen, curves in pairs if detector in curves]
            harmless = [alarm for rigged, alarm in hits if not rigged]
            rigged = [alarm for rigged, alarm in hits if rigged]
            found[detector].append((alpha, sum(harmless) / len(harmless), sum(rigged) / len(rigged)))
    return found


def plot(curves: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    """Both rates over the false-alarm rate that was asked for: on the zoo a usual ROC curve would be two points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharex=True, sharey=True)
    for axis, index, title in ((axes[0], 1, "harmless, false alarms"), (axes[1], 2, "rigged, found")):
        for detector, points in curves.items():
            axis.plot(
                [-math.log10(point[0]) for point in points], [point[index] for point in points], "o-", label=detector
            )
        axis.axvline(-math.log10(ALPHA), color="grey", linestyle=":", label="the scanner's, all detectors together")
        axis.set(title=title, xlabel="alarms allowed in a clean scan, 10^-x", ylabel="share of scans", xlim=(0, 20))
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__ or "", RESULTS / "scan_accuracy.json")
    parser.add_argument("--seeds", type=int, default=5, help="quick scans of each specimen")
    parser.add_argument("--deep", nargs="*", metavar="NAME", help="specimens to scan deep; all without names")
    parser.add_argument("--deep-only", action="store_true", help="scan those deep, which is kept, and write nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="specimens whose name has one of these in it")
    arguments = parser.parse_args()
    specimens = [each for each in zoo() if not arguments.only or any(part in each.name for part in arguments.only)]
    rows, scans = [], []
    for specimen in tqdm(specimens):
        chosen = not arguments.deep or any(part in specimen.name for part in arguments.deep)
        deep_scan = deep(specimen, arguments.deep is not None and chosen)
        if arguments.deep_only:
            continue
        found = [quick(specimen, seed) for seed in range(arguments.seeds)]
        scans += [(specimen, each) for each in found]
        row = row_of(specimen, found, deep_scan)
        rows.append(row)
        tqdm.write(
            f"{specimen.kind:10} {specimen.name}: {row['alarms']}/{len(found)} {row['verdict']} {row['detectors']}"
        )
    if arguments.deep_only:
        return
    print_table([{name: value for name, value in row.items() if name != "reason"} for row in rows])
    curves = roc(scans)
    write("scan_accuracy", rows, arguments.output)
    points = [
        {"detector": name, "alpha": alpha, "false alarms": false, "found": found}
        for name, curve in curves.items()
        for alpha, false, found in curve
    ]
    write("scan_roc", points, arguments.output.with_name("scan_roc.json"))
    plot(curves, arguments.output.with_name("scan_roc.png"))


if __name__ == "__main__":
    main()
