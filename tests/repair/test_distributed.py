"""Two processes, replicated or sharded, end with the weights of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_step import steps
from safetensors.torch import load_file
from test_anchor import EXAMPLES, llama

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    anchor = tmp_path / "anchor"
    llama(1).to(torch.bfloat16).save_pretrained(anchor)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, HERE / "distributed_step.py", kind, anchor, tmp_path / "out.safetensors"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    got = load_file(tmp_path / "out.safetensors")
    for decoupled in (False, True):
        model = llama()
        distance = steps(model, [EXAMPLES[2 * step : 2 * step + 2] for step in range(3)], anchor, decoupled=decoupled)
        assert got[f"{decoupled}.distance"].item() == pytest.approx(distance, rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got[f"{decoupled}.{name}"], parameter.data, rtol=1e-5, atol=1e-6)
