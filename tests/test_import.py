"""Importing the package stays light."""

import subprocess
import sys

import pytest

EXTRAS = (
    "gptqmodel",
    "torchao",
    "optimum.quanto",
    "optimum.gptq",
    "matplotlib",
    "gguf",
    "libgguf",
    "bitsandbytes",
    "torchmetrics",
    "datasets",
    "numba",
    "ray",
    "scipy",
)


@pytest.fixture(scope="module", params=["import optimum_qguard", "import transformers, optimum_qguard"])
def imported(request: pytest.FixtureRequest) -> set[str]:
    """Names of the modules that a fresh process holds after the import."""
    program = f"{request.param}, sys; print(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize("extra", EXTRAS)
def test_import_loads_no_extra(imported: set[str], extra: str) -> None:
    assert "optimum_qguard" in imported
    assert extra not in imported
