"""Runs the report into a folder, unless another process of the same test session has: report_once.py FOLDER [all]."""

import contextlib
import sys
from pathlib import Path

from filelock import FileLock

from dskd_fast.kernels import report

KINDS = ("near", "other", "far", "keys")

all_cases = report.cases


def some_cases(architectures, precisions):
    """About an eighth of all: half of the table's entries with one kind of row each, by turns.

    Of every architecture all widths, precisions and kinds come up, and of every entry half of the architectures. Of the
    kernels over positions all on one, on the others those that halves are made by, or on the other vendor's floats.
    """
    for case in all_cases(architectures, precisions):
        precision = precisions.index(case.precision)
        if case.kernel in ("forward", "gradient"):
            turn = report.WIDTHS.index(case.width) + precision
            is_turn = (turn + architectures.index(case.architecture)) % 2 == 0
            if is_turn and KINDS[(turn + (case.kernel == "gradient")) % 4] == case.kind:
                yield case
        elif case.architecture == "sm_90" or case.precision == {"gfx942": "fp32"}.get(case.architecture, "bf16"):
            yield case


def few_cases(architectures, precisions):
    """Every 7th of those, and all kinds of rows of one entry."""
    some = list(some_cases(architectures, precisions))
    of_one_entry = [c for c in all_cases(["sm_80"], ["bf16"]) if c.width == 64]
    return [*some[::7], *(case for case in of_one_entry if case not in some[::7])]


def main(folder, *selection):
    code = folder / "code"
    with FileLock(folder / "lock"):
        if not code.exists():
            report.cases = some_cases if selection else few_cases
            with (folder / "output.txt").open("w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
                code.write_text(str(report.main(["--json", str(folder / "rows.json")])))
    return int(code.read_text())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
