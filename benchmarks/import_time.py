"""How long importing this package takes, beside transformers: fresh processes in turn."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from harness import RESULTS, alternate, parse_args, print_table, write

REFERENCES = {
    "import transformers": "import transformers",
    "import optimum_qguard": "import transformers",
    "import transformers, optimum_qguard": "import transformers",
    "from transformers import AutoModelForCausalLM": "from transformers import AutoModelForCausalLM",
    "from transformers import AutoModelForCausalLM; from optimum_qguard import QGuardConfig": (
        "from transformers import AutoModelForCausalLM"
    ),
}


def main() -> None:
    """Measure, print and write."""
    arguments = parse_args(__doc__, RESULTS / "import_time.json")
    timings = alternate({statement: partial(run_in_new_process, statement) for statement in REFERENCES}, repeats=9)
    rows = [
        {
            "statement": statement,
            "seconds": timings.median(statement),
            "compared with": reference,
            "ratio": timings.ratio(statement, reference),
        }
        for statement, reference in REFERENCES.items()
    ]
    print_table(rows)
    write("import_time", rows, arguments.output)


def run_in_new_process(statement: str) -> None:
    """Time this, interpreter start included."""
    subprocess.run([sys.executable, "-c", statement], check=True)


if __name__ == "__main__":
    main()
