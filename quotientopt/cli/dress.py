"""``quotientopt dress``."""

import argparse
from typing import Any

from quotientopt.cli.parser import Parser, fail, interrupted
from quotientopt.cli.quiet import quiet_transformers

SECTIONS = ("svd", "balanced", "orthonormal", "triangular")


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "dress",
        help="write a checkpoint in canonical form, which computes the same",
        description=(
            "Brings all head pairs of a checkpoint to a section of their orbits and writes a copy "
            "with the same names, dtypes, shards and other files. The outputs on random inputs "
            "are compared before and after, and the copy is loaded again, before it gets its name."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("path", metavar="MODEL_DIR", help="folder with config.json and weights, or weights alone")
    add(
        "--out",
        required=True,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="folder to write, or file for weights alone",
    )
    add(
        "--section",
        default="svd",
        choices=SECTIONS,
        help="svd: one representative per orbit; others up to a rotation or signs in every head",
    )
    add(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="config.json of a single file of weights",
    )
    add(
        "--residual",
        action="store_true",
        default=argparse.SUPPRESS,
        help="rotate the residual stream too, to its principal axes; needs gains that are one",
    )
    add(
        "--overwrite",
        action="store_true",
        default=argparse.SUPPRESS,
        help="replace the checkpoint at --out, once the copy is complete; other files there stay",
    )


def run(arguments: list[str], options: dict[str, Any]) -> int:
    """Dress a checkpoint."""
    from quotientopt.checkpoints import CheckpointError, dress_checkpoint

    quiet_transformers()
    try:
        report = dress_checkpoint(**options)
    except CheckpointError as error:
        fail(str(error))
    except KeyboardInterrupt:
        return interrupted("nothing written")
    print(report)
    print(f"\nwritten: {options['out']}")
    return 0
