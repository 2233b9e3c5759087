"""The command `lattice`. Commands import torch and the like when they run, so that `--help` is quick."""

from __future__ import annotations

import errno
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lattice_serve.clients.cli import bench, chat, failure, generate, init, serve
from lattice_serve.clients.errors import ClientError
from lattice_serve.engine.errors import LatticeError


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Turns this project's errors, and a full disk, into one line and exit code 2. Anything else is a bug and shows
        its traceback."""
        _open_streams()
        try:
            return super().invoke(ctx)
        except (LatticeError, ClientError) as error:
            failure.show(error)
            raise typer.Exit(2) from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            sys.stdout = None  # what is left of it would be tried again at the end
            failure.show(error)
            raise typer.Exit(2) from error


main = typer.Typer(cls=_Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _open_streams() -> None:
    """Standard streams that whoever started this has closed: what is opened next would take their places, where libuv
    does not suffer it, and where other processes of this program write their messages."""
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("lattice-serve"))
        raise typer.Exit


@main.callback()
def lattice(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve Lattice language models: constant memory a request, whatever the length of its context."""


main.command()(serve.serve)
main.command()(chat.chat)
main.command()(generate.generate)
main.command()(init.init)
main.add_typer(bench.bench)
