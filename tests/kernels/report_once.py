"""Runs the report into a folder, unless another process of the same test session has: report_once.py FOLDER [all].

Without "all" it is of every 11th case, and of all kinds of rows of one entry.
"""

import contextlib
import sys
from pathlib import Path

from filelock import FileLock

from dskd_fast.kernels import report

all_cases = report.cases


def some_cases(architectures, precisions):
    for at, case in enumerate(all_cases(architectures, precisions)):
        if at % 11 == 0 or case[:3] == ("sm_80", "bf16", 64):
            yield case


def main(folder, *selection):
    code = folder / "code"
    with FileLock(folder / "lock"):
        if not code.exists():
            report.cases = all_cases if selection else some_cases
            with (folder / "output.txt").open("w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
                code.write_text(str(report.main(["--json", str(folder / "rows.json")])))
    return int(code.read_text())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
