"""Entry point of the command line ``fisedit``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fisedit_compile.cli.bench import app as bench
from fisedit_compile.cli.demo import demo
from fisedit_compile.cli.edit import edit
from fisedit_compile.cli.eval import evaluate
from fisedit_compile.cli.explain import explain
from fisedit_compile.cli.generate import generate
from fisedit_compile.errors import FisEditError

# Typer shows neither this class nor, in all its releases, whose it is: the parent of what commands raise.
UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="fisedit",
    help="Edit generated pictures at the cost of what changes.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(generate)
app.command()(edit)
app.command("eval")(evaluate)
app.command()(explain)
app.add_typer(bench, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        from fisedit_compile import __version__

        typer.echo(f"fisedit {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Edit generated pictures at the cost of what changes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Raises:
        SystemExit: always: 0 after success, 1 when the command failed, 2 when it was called wrongly.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=words or ["--help"], standalone_mode=False)
    except UsageError as error:
        print(f"fisedit: error: {one_line(error.format_message())} (see fisedit --help)", file=sys.stderr)
        raise SystemExit(2) from None
    except (FisEditError, OSError) as error:
        print(f"fisedit: error: {one_line(str(error) or type(error).__name__)}", file=sys.stderr)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, typer.Abort):
        print("fisedit: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def one_line(text: str) -> str:
    """A message on one line."""
    return " ".join(text.split())


if __name__ == "__main__":
    main()
