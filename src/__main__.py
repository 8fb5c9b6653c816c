"""The command line: `python -m graftwork demo`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from typing import NoReturn

from . import GraftworkError, __version__, demo
from .models.loading import TINY


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"graftwork: {message}. `python -m graftwork --help` explains.\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; gives the exit code: 0, or 2 for something that cannot be done."""
    parser = Parser(
        prog="python -m graftwork",
        description="graftwork reads and changes what happens inside a neural network while it runs.",
        epilog="The library itself is used from Python: see README.md.",
    )
    parser.add_argument("--version", action="version", version=f"graftwork {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", parser_class=Parser)
    show = commands.add_parser(
        "demo",
        help="three experiments on a small model, drawn in the terminal; a few seconds, no network",
        description="A logit lens, a head ablation and an activation patch, drawn in the terminal.",
    )
    show.add_argument(
        "--model", default=TINY, help="a GPT-2, by hub id or folder (default: %(default)s)"
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands.choices:
        parser.error(f"there is no command {arguments[0]!r}, there is `demo`")
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 0
    if given.model == TINY:
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call] # it loads in a moment
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where there are no block characters
    try:
        demo.main(given.model)
    except GraftworkError as error:
        print(f"graftwork: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough, as in `... demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
