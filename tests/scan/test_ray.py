"""A scan on a real Ray cluster on this machine."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from optimum_qguard import scan
from optimum_qguard.checkpoint import CheckpointError
from optimum_qguard.cli import main
from optimum_qguard.cli.scan import exit_code
from optimum_qguard.scan.engines import get_engine
from optimum_qguard.scan.engines import ray as engine
from optimum_qguard.scan.errors import ScanError
from optimum_qguard.scan.report import ScanReport

_CLUSTER = """
import ray, sys
options = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False, "log_to_driver": False}
options["_node_ip_address"] = "127.0.0.1"
print(ray.init(**options).address_info["address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="class")
def cluster() -> Iterator[None]:
    """Two CPUs, in other processes, with a token that Ray reads when it is imported."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "token")
        environment.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        ray = pytest.importorskip("ray")
        command = [sys.executable, "-c", _CLUSTER]
        with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as process:
            environment.setenv("RAY_ADDRESS", process.stdout.readline().strip())
            yield
            ray.shutdown()
            process.communicate()


@pytest.fixture
def big(tiny_llama: Path, tmp_path: Path) -> Path:
    """Enough tensors for several tasks: the tiny Llama's file four times."""
    for copy in range(4):
        shutil.copy(tiny_llama / "model.safetensors", tmp_path / f"model-{copy}.safetensors")
    return tmp_path


def content(report: ScanReport) -> dict[str, Any]:
    """All but times."""
    found = report.model_dump(exclude={"created", "seconds"})
    for run in found["detectors"]:
        del run["seconds"]
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
class TestOnACluster:
    @pytest.mark.parametrize("full", [False, True], ids=["quick", "full"])
    def test_same_report(self, big: Path, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(big.parent)
        local, remote = (scan(big.name, seed=7, full=full, engine=name) for name in ("local", "ray"))
        assert content(remote) == content(local)
        assert local.coverage.tensors_scanned == 84

    def test_a_killed_worker_loses_nothing(
        self, big: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deaths = tmp_path_factory.mktemp("deaths")
        work = engine._work

        def work_after_dying(task: Any) -> Any:  # of this function, so it travels as it is
            mark = deaths / task.tensors[0].file
            if mark.name == "model-1.safetensors" and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return work(task)

        expected = content(scan(big, seed=7))
        monkeypatch.setattr(engine, "_work", work_after_dying)
        assert content(scan(big, seed=7, engine="ray")) == expected
        assert len(list(deaths.iterdir())) == 1

    def test_what_a_worker_raises(self, big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(task: Any) -> Any:
            raise CheckpointError(f"{task.tensors[0].file}: gone")

        monkeypatch.setattr(engine, "_work", fail)
        with pytest.raises(CheckpointError, match=r"^model-\d\.safetensors: gone$"):
            scan(big, engine="ray")

    def test_command_line(self, big: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
        models = [str(big), str(tiny_llama)]
        expected = [scan(model, seed=7) for model in models]
        capfd.readouterr()
        code = main(["scan", *models, "--engine", "ray", "--workers", "2", "--seed", "7", "--json"])
        out, err = capfd.readouterr()
        assert (code, err) == (exit_code(expected, "warning"), "")
        reports = [ScanReport.model_validate(report) for report in json.loads(out)["reports"]]
        assert [content(report) for report in reports] == [content(report) for report in expected]


def test_no_cluster(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ScanError, match=r"no Ray cluster at 127\.0\.0\.1:1.*ray start --head"):
        scan(tiny_llama, engine="ray")


def test_registered() -> None:
    assert get_engine("ray") is engine.run
