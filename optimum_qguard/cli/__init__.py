"""The command line: ``qguard VERB …``.

Each file here whose name does not begin with an underscore is a verb, found by itself: its function ``command`` takes
the arguments, and its docstring is the help text. A folder is a verb that has verbs of its own (``qguard attack …``),
one file each; its docstring is their help text. File names have ``_`` where verbs have ``-``. A verb parses and prints;
what it does is elsewhere in the package. Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import traceback
from types import ModuleType
from typing import Annotated, Any

import typer

from optimum_qguard import __version__

EXIT_ERROR = 2
EXIT_USAGE = 64
EXIT_INTERRUPTED = 130

_DEBUG = "--debug"
_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]


def verbs() -> list[str]:
    """The names of all verbs, sorted."""
    return sorted(entry.name for entry in pkgutil.iter_modules(__path__) if not entry.name.startswith("_"))


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; ``sys.argv``'s by default.

    Returns:
        The exit code: 0, 2 after an error (one line on standard error), 64 after a usage error. A verb may have others.
    """
    given = sys.argv[1:] if argv is None else argv
    arguments = [argument for argument in given if argument != _DEBUG]
    try:
        code = _command().main(arguments, prog_name="qguard", standalone_mode=False)
    except _USAGE_ERROR as error:
        return _report_usage(error)
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except Exception as error:
        if _DEBUG in given:
            traceback.print_exc()
        else:
            from optimum_qguard.cli._errors import one_line

            print(f"qguard: {one_line(error)}", file=sys.stderr)
        return EXIT_ERROR
    if code == EXIT_INTERRUPTED:  # typer returns it, instead of raising
        print("qguard: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _command() -> Any:
    app = typer.Typer(add_completion=False, no_args_is_help=True)
    app.callback()(_root)
    _add_verbs(app, importlib.import_module(__name__))
    return typer.main.get_command(app)


def _add_verbs(app: typer.Typer, package: ModuleType) -> None:
    for entry in sorted(pkgutil.iter_modules(package.__path__), key=lambda entry: entry.name):
        if entry.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        name = entry.name.replace("_", "-")
        if entry.ispkg:
            group = typer.Typer(no_args_is_help=True, help=module.__doc__)
            _add_verbs(group, module)
            app.add_typer(group, name=name)
        else:
            app.command(name)(module.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qguard {__version__}")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
    _debug: Annotated[
        bool, typer.Option(_DEBUG, help="Show a traceback after an error; may stand after the verb as well.")
    ] = False,
) -> None:
    """Guard models against behaviour that a publisher planted for the rounding of their weights."""


def _report_usage(error: Any) -> int:
    message = " ".join(error.format_message().split())
    where = error.ctx.command_path if error.ctx is not None else "qguard"
    if message:
        print(f"{where}: {message.rstrip('.')}; see {where} --help", file=sys.stderr)
    return EXIT_USAGE
