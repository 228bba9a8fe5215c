"""The command line ``fisedit``."""

from importlib import import_module

from fisedit_compile.errors import MissingPackageError

for _name in ("typer", "rich"):
    try:
        import_module(_name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or _name, "the command line") from error
