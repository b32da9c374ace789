"""``optimum-cli qguard …`` is ``qguard …``.

optimum's command line imports every file of the namespace folder ``optimum.commands.register``. None of its folders may
have an ``__init__.py``: that would hide the rest of ``optimum``.
"""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class QGuardCommand(BaseOptimumCLICommand):
    """Hands everything after ``optimum-cli qguard`` to `optimum_qguard.cli.main`, ``--help`` included."""

    COMMAND = CommandInfo(name="qguard", help="Guard against behaviour that a publisher planted for the rounding.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.prefix_chars = "\0"  # so that argparse takes no argument for an option of its own
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        from optimum_qguard.cli import main

        raise SystemExit(main(self.args.arguments))


REGISTER_COMMANDS = [QGuardCommand]
