"""The command line: ``lightning-stosign``, also as ``python -m lightning_stosign``."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_stosign.health.forecast import check_format
from lightning_stosign.inspection.as_json import as_json, as_json_series
from lightning_stosign.inspection.messages import CheckpointError, printable
from lightning_stosign.inspection.page import render_page
from lightning_stosign.inspection.page_file import PageFileError, check_page_file, write_page
from lightning_stosign.inspection.report import DEFAULT_FORECAST, Report, inspect_checkpoint
from lightning_stosign.inspection.table import WORST, print_series, print_table, require_rich
from lightning_stosign.inspection.verdict import Limits, find_collapses, verdict_line

_COLLAPSED = 1
_FAILED = 2  # as argparse exits on a bad argument


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: what follows the command's name; None: ``sys.argv``.

    Returns:
        The exit code: 0; 1 where ``--check`` finds a collapse; 2 after a line on standard error that says what is
        wrong.
    """
    options = _parser().parse_args(args)
    command = options.command
    try:
        return _inspect(options) if command == "inspect" else _demo(options)
    except (CheckpointError, PageFileError, _BadArgument, ModuleNotFoundError) as error:
        message = printable(str(error), longest=2000)
    except MemoryError:
        message = "the memory of this machine does not suffice"
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    print(f"lightning-stosign {command}: {message}", file=sys.stderr)
    return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-stosign", description="Optimizers that survive low precision, and their instruments."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="show the health of the optimizer states in a checkpoint",
        description="Show what the optimizer states in a checkpoint hold, and what low-precision formats would lose "
        "of them. Reads the files and folders of Lightning, Fabric, torch.distributed.checkpoint, Hugging Face's "
        "Trainer, accelerate, DeepSpeed and others. Needs no code of the model, and runs none that is in the file.",
        epilog="exit codes: 0; 1 when --check finds a collapse; 2 after one line that says what is wrong",
    )
    inspect.add_argument(
        "checkpoint", nargs="+", help="a file or folder; several of one run make a table over their steps"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="also write one self-contained page with figures")
    inspect.add_argument(
        "--forecast",
        nargs="*",
        default=list(DEFAULT_FORECAST),
        metavar="FORMAT",
        help="formats to forecast, e.g. fp8-raw fp8-raw:static_scale=1024 fp8:dtype=float8_e5m2 fp8-block bfloat16 "
        "fp4-block (default: %(default)s)",
    )
    shown = inspect.add_mutually_exclusive_group()
    shown.add_argument(
        "--top", type=_positive, metavar="N", default=WORST, help="show the worst N layers (default: %(default)s)"
    )
    shown.add_argument("--all", action="store_true", help="show every layer, in the optimizer's order")
    check = inspect.add_argument_group("check", "the conditions and limits of StateCollapseGuard")
    defaults = Limits()
    check.add_argument(
        "--check",
        action="store_true",
        help="print one line instead of a table, and exit with 1 if a state has collapsed in any checkpoint",
    )
    for name, what in (
        ("zero", "zeros in a watched state"),
        ("dead", "coordinates with numerator 0 and denominator 0"),
        ("exploding", "coordinates with denominator 0 and numerator not"),
    ):
        check.add_argument(
            f"--max-{name}-fraction",
            type=_share,
            metavar="SHARE",
            default=getattr(defaults, f"max_{name}_fraction"),
            help=f"largest healthy share of {what} (default: %(default)s)",
        )
    check.add_argument(
        "--states",
        nargs="+",
        metavar="STATE",
        help="watch the zeros of these states (default: what the update is divided by)",
    )
    check.add_argument("--per-layer", action="store_true", help="each layer has to keep to the limits")
    demo = commands.add_parser(
        "demo",
        help="train a small GPT with AdamW and StoSignSGD in FP8, and compare",
        description="Train a GPT of 0.8 M parameters on the source of Python's standard library, four times: AdamW and "
        "StoSignSGD, with float32 and with FP8 optimizer states. Takes minutes on a CPU, and leaves a figure and "
        "TensorBoard logs.",
        argument_default=argparse.SUPPRESS,
    )
    demo.add_argument("--steps", type=_positive, help="optimizer steps of each run (default: 150)")
    demo.add_argument("--lr", type=float, help="learning rate of each run (default: 0.001)")
    demo.add_argument("--out", help="folder for the results, emptied first (default: runs/demo)")
    return parser


def _demo(options: argparse.Namespace) -> int:
    from lightning_stosign._demo_scripts import run_demo

    run_demo(**{name: value for name, value in vars(options).items() if name != "command"})
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be in [0, 1]")
    return share


class _BadArgument(ValueError):
    """An argument that the command cannot work with; the message is one line."""


def _inspect(options: argparse.Namespace) -> int:
    for name in options.forecast:
        try:
            check_format(name)
        except ValueError as error:
            raise _BadArgument(f"--forecast: {error}") from error
    if options.html is not None:
        _check_html(options.html, options.checkpoint)
    limits = Limits(
        options.max_zero_fraction,
        options.max_dead_fraction,
        options.max_exploding_fraction,
        None if options.states is None else tuple(options.states),
        options.per_layer,
    )
    if not options.json and not options.check:
        require_rich()
    reports = [
        inspect_checkpoint(path, options.forecast, histograms=options.html is not None) for path in options.checkpoint
    ]
    _check_states(reports, limits)
    if options.html is not None:
        write_page(options.html, render_page(reports))
    # A name in a file may have characters that the terminal's encoding lacks.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    _print(reports, options, limits)
    sys.stdout.flush()
    if options.check and any(find_collapses(report, limits) for report in reports):
        return _COLLAPSED
    return 0


def _print(reports: Sequence[Report], options: argparse.Namespace, limits: Limits) -> None:
    verdicts = [verdict_line(report, limits) for report in reports] if options.check else []
    if options.json:
        content = as_json(reports[0]) if len(reports) == 1 else as_json_series(reports)
        if options.check:
            content["check"] = {
                "collapsed": any(find_collapses(report, limits) for report in reports),
                "lines": verdicts,
                "limits": dataclasses.asdict(limits),
            }
        print(json.dumps(content, indent=2, allow_nan=False))
    elif options.check:
        print("\n".join(verdicts))
    elif len(reports) > 1:
        print_series(reports)
    else:
        print_table(reports[0], top=None if options.all else options.top)


def _check_states(reports: Sequence[Report], limits: Limits) -> None:
    """Raise if a state that is to be watched is in none of the checkpoints."""
    present = {name for report in reports for optimizer in report.optimizers for name in optimizer.states}
    if present and (missing := set(limits.states or ()) - present):
        raise _BadArgument(f"--states: there is no state {sorted(missing)}; accepted: {sorted(present)}")


def _check_html(page: Path, checkpoints: Sequence[str]) -> None:
    try:
        check_page_file(page)
    except PageFileError as error:
        raise PageFileError(f"--html: {error}") from error
    for checkpoint in map(Path, checkpoints):
        if checkpoint.is_dir() and page.absolute().is_relative_to(checkpoint.absolute()):
            raise _BadArgument(f"--html: {page} lies in the checkpoint {checkpoint}: it is not written there")
