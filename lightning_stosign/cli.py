"""The command line: ``lightning-stosign``, also as ``python -m lightning_stosign``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_stosign.health.forecast import check_format
from lightning_stosign.inspection.checkpoint import CheckpointError
from lightning_stosign.inspection.page import render_page
from lightning_stosign.inspection.report import DEFAULT_FORECAST, as_json, inspect_checkpoint
from lightning_stosign.inspection.table import print_table

_FAILED = 2  # as argparse exits on a bad argument


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: what follows the command's name; None: ``sys.argv``.

    Returns:
        The exit code: 0, or 2 after a line on standard error that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-stosign", description="Optimizers that survive low precision, and their instruments."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="show the health of the optimizer states in a Lightning checkpoint",
        description="Show what the optimizer states in a Lightning checkpoint hold, and what low-precision formats "
        "would lose of them. Needs no code of the model, and runs none that is in the file.",
    )
    inspect.add_argument("checkpoint", type=Path, help="a .ckpt file")
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
    options = parser.parse_args(args)
    try:
        _inspect(options.checkpoint, options.forecast, options.json, options.html)
    except (CheckpointError, _BadArgument, ModuleNotFoundError) as error:
        print(f"lightning-stosign inspect: {error}", file=sys.stderr)
        return _FAILED
    return 0


class _BadArgument(ValueError):
    """An argument that the command cannot work with; the message is one line."""


def _inspect(checkpoint: Path, forecast: Sequence[str], as_text: bool, html: Path | None) -> None:
    for name in forecast:
        try:
            check_format(name)
        except ValueError as error:
            raise _BadArgument(f"--forecast: {error}") from error
    report = inspect_checkpoint(checkpoint, forecast)
    if html is not None:
        page = render_page(report)
        try:
            html.write_text(page, encoding="utf-8")
        except OSError as error:
            raise _BadArgument(f"--html: {html} cannot be written: {error.strerror or error}") from error
    if as_text:
        print(json.dumps(as_json(report), indent=2, allow_nan=False))
    else:
        print_table(report)
