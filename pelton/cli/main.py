"""``pelton VERB ...``: one file per verb, imported only when its verb is asked for.

To add a verb: write ``cli/<verb>.py`` with a function whose signature is the command line (typer) and
whose docstring is the help, import heavy things inside it, and add a line to ``VERBS``.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer

from ..errors import PeltonError

#: verb -> module and function, in the order of the help
VERBS = {
    "run": "pelton.cli.run:run",
    "generate": "pelton.cli.generate:generate",
    "build": "pelton.cli.build:build",
    "inspect": "pelton.cli.inspect:inspect",
    "doctor": "pelton.cli.doctor:doctor",
    "dump-graph": "pelton.cli.dump_graph:dump_graph",
}


def main() -> None:
    """The console script. Exit codes: 0, 2 for a user error, 130 after Ctrl-C."""
    arguments = sys.argv[1:]
    verb = arguments[0] if arguments and arguments[0] in VERBS else None
    try:
        make_app(verb)()
    except KeyboardInterrupt:  # while modules were still loading
        sys.exit(130)


def make_app(verb: str | None = None) -> typer.Typer:
    """The application with one verb, or with all of them, which the help needs."""
    app = typer.Typer(
        name="pelton",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,  # plain help: importing rich would double the time to the first line
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_pelton)
    for name in VERBS if verb is None else (verb,):
        module, function = VERBS[name].split(":")
        app.command(name)(guarded(getattr(import_module(module), function)))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


def _pelton(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """LLM inference that gets the most out of the hardware you have, and proves it with numbers."""


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """The verb with its errors turned into one line and an exit code."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except PeltonError as error:
            print_error(error)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except BrokenPipeError:
            # The reader left (as `head` does). Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise SystemExit(141) from None

    return call


def print_error(error: PeltonError) -> None:
    """One line on stderr, the word in red on a terminal."""
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print("\x1b[31merror:\x1b[0m" if colour else "error:", error, file=sys.stderr)


if __name__ == "__main__":
    main()
