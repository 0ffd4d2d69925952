"""The command ``quotientopt``."""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import NoReturn

USAGE_ERROR = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit."""
        fail(message)


def fail(message: str) -> NoReturn:
    """Print one line on standard error and exit with status 2."""
    print("quotientopt: error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(USAGE_ERROR)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="quotientopt",
        description="Riemannian optimization on quotient manifolds of Transformer symmetries.",
    )
    version = importlib.metadata.version("quotientopt")
    parser.add_argument("--version", action="version", version=f"quotientopt {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compare(commands)
    return parser


def _add_compare(commands: "argparse._SubParsersAction[Parser]") -> None:
    compare = commands.add_parser(
        "compare",
        help="train a small model with several optimizers, each tuned, and report",
        description=(
            "Tunes every optimizer's learning rate on one model and data set, under one protocol, "
            "and writes compare.json (everything measured), compare.md (tables) and compare.png "
            "(curves)."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = compare.add_argument
    add(
        "--optimizers",
        default="adamw,quotient-adam,soap,muon",
        metavar="NAMES",
        help="comma-separated, of adamw, quotient-adam, soap, muon, geoopt-adam",
    )
    add(
        "--data",
        default="auto",
        help=(
            "stdlib, shakespeare or the path of a file for gpt and llama; fashion-mnist or "
            "mnist-5k for vit; auto is stdlib or fashion-mnist"
        ),
    )
    add("--model", default="gpt", help="gpt, llama or vit")
    add("--steps", type=int, default=600, metavar="N", help="training steps per run")
    add(
        "--lr-grid",
        default="auto",
        metavar="GRID",
        help="auto (search), 1e-3,2e-3 (for all), or adamw=1e-3:2e-3,soap=4e-3 (rest: search)",
    )
    add("--seeds", type=int, default=1, metavar="N", help="seeds for each best setting")
    add("--device", default="auto", help="auto, cpu or cuda")
    add(
        "--out",
        default="quotientopt-compare",
        metavar="DIR",
        help="folder for the results; an earlier comparison there is replaced, unless resumed",
    )
    add(
        "--jobs",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="runs at a time, sharing the cores (default: one per core; on CUDA one in all)",
    )
    add(
        "--resume",
        action="store_true",
        default=argparse.SUPPRESS,
        help="reuse the runs in DIR/compare.json, which must be of the same protocol",
    )
    add(
        "--redo",
        metavar="NAMES",
        default=argparse.SUPPRESS,
        help="with --resume: make the runs of these optimizers anew, comma-separated",
    )
    for name, meaning in (
        ("batch", "sequences or images per step (default: 16, vit 64)"),
        ("context", "tokens per sequence, for texts (default: 128)"),
        ("layers", "layers of the model (default: 4)"),
        ("width", "width of the model, a multiple of 8 (default: 128, vit 64)"),
    ):
        add(f"--{name}", type=int, metavar="N", default=argparse.SUPPRESS, help=meaning)


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
    return compare(arguments, options)


def compare(arguments: list[str], options: dict[str, object]) -> int:
    """Run a comparison; what was measured before an interrupt is reported all the same."""
    from quotientopt.compare.comparison import Comparison, Request, command_line
    from quotientopt.compare.errors import UsageError

    interrupted = False
    try:
        request = Request(command=command_line(arguments), **options)  # type: ignore[arg-type]
        comparison = Comparison(request)
    except UsageError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("quotientopt: interrupted, nothing written", file=sys.stderr)
        return INTERRUPTED
    try:
        comparison.run()
    except KeyboardInterrupt:
        interrupted = True
    written = comparison.write_report()
    if interrupted:
        runs = len(comparison.record.runs)
        folder = comparison.folder
        print(f"quotientopt: interrupted, {runs} runs are reported in {folder}", file=sys.stderr)
        return INTERRUPTED
    print(written[0].read_text(encoding="utf-8").partition("## All runs")[0].rstrip())
    print("\nwritten: " + ", ".join(str(path) for path in written))
    return 0
