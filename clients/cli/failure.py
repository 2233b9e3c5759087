"""How a command says that it failed."""

import typer


def show(error: Exception) -> None:
    """One line on standard error."""
    typer.secho(f"error: {' '.join(str(error).split())}", fg="red", err=True)
