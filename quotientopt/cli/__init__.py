"""The command ``quotientopt``: a comparison of optimizers, and what is done with checkpoints."""

import argparse
import sys
from collections.abc import Sequence

from quotientopt._version import __version__
from quotientopt.cli.checkpoints import add_dress, add_inspect
from quotientopt.cli.compare import add_compare
from quotientopt.cli.parser import TERMINATED, Parser, TerminatedError, terminable


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="quotientopt",
        description="Riemannian optimization on quotient manifolds of Transformer symmetries.",
    )
    parser.add_argument("--version", action="version", version=f"quotientopt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_command in (add_compare, add_inspect, add_dress):
        add_command(commands)
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
    del options["command"]
    run = options.pop("run")
    try:
        with terminable():
            return run(arguments, options)
    except TerminatedError:
        print("quotientopt: terminated", file=sys.stderr)
        return TERMINATED
