"""``quotientopt compare``."""

import argparse

from quotientopt.cli.parser import Parser, fail, interrupted


def add_compare(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command to the command line."""
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
        help="comma-separated, of adamw, soap, kl-soap, soap-muon, muon, muon2, normuon, adamuon, "
        "compositional-muon, dressed-muon, geoopt-adam, quotient-adam and its forms "
        "quotient-adam-leading, quotient-adam-fresh, quotient-adam-hidden, quotient-adam-full, "
        "quotient-adam-small, quotient-adam-stream-only, quotient-adam-heads-only, "
        "quotient-adam-no-polar, and quotient-adam-0.1, the defaults of that version",
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
        help="folder for the results; one that holds a comparison needs --resume or --overwrite",
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
        "--overwrite",
        action="store_true",
        default=argparse.SUPPRESS,
        help="replace the comparison in DIR, once the first run is finished",
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
    compare.set_defaults(run=run_compare)


def run_compare(arguments: list[str], options: dict[str, object]) -> int:
    """Run a comparison; what was measured before an interrupt is reported all the same."""
    from quotientopt.compare.comparison import Comparison, Request, command_line
    from quotientopt.compare.protocol import RunFailedError, UsageError

    try:
        request = Request(command=command_line(arguments), **options)  # type: ignore[arg-type]
        comparison = Comparison(request)
    except UsageError as error:
        fail(str(error))
    except KeyboardInterrupt:
        return interrupted("nothing written")
    with comparison:
        failed, stopped = "", False
        try:
            comparison.run()
        except KeyboardInterrupt:
            stopped = True
        except RunFailedError as error:
            failed = str(error)
        try:
            written = comparison.write_report()
        except RunFailedError as error:
            fail(failed or str(error))
    runs = len(comparison.record.runs)
    kept = f"{runs} runs are reported in {comparison.folder}" if written else "nothing written"
    if stopped:
        return interrupted(kept)
    if failed:
        fail(f"{failed}; {kept}" + (", --resume goes on" if written else ""))
    print(written[0].read_text(encoding="utf-8").partition("## All runs")[0].rstrip())
    print("\nwritten: " + ", ".join(str(path) for path in written))
    return 0
