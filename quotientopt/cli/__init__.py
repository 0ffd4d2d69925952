"""The command ``quotientopt``: one module for each of its commands."""

import argparse
import sys
from collections.abc import Sequence

from quotientopt._version import __version__
from quotientopt.cli import compare, dress, inspect
from quotientopt.cli.parser import TERMINATED, Parser, TerminatedError, terminable

COMMANDS = (compare, inspect, dress)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="quotientopt",
        description="Riemannian optimization on quotient manifolds of Transformer symmetries.",
    )
    parser.add_argument("--version", action="version", version=f"quotientopt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = vars(build_parser().parse_args(arguments))
    name = options.pop("command")
    command = next(command for command in COMMANDS if command.__name__.endswith(f".{name}"))
    try:
        with terminable():
            return command.run(arguments, options)
    except TerminatedError:
        print("quotientopt: terminated", file=sys.stderr)
        return TERMINATED
