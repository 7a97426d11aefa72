"""`python -m bench.gpu --out OUT`: see bench/README.md."""

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu.driver import TABLE, Driver
from bench.gpu.plan import BUILD, REAL, REHEARSAL, STEPS, Step


def main() -> int:
    """Run everything, or one process of one step."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8, metavar="M", help="for everything (default: 8)")
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU, in place of a GPU")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STEPS], metavar="STEP", help="these steps alone")
    parser.add_argument("--spent", type=float, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=[step.name for step in (BUILD, *STEPS)], help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 0 < arguments.minutes <= 9:
        parser.error(f"--minutes is {arguments.minutes:g}: use a number above 0, up to 9")
    if arguments.step:
        from bench.gpu import steps

        plan = REHEARSAL if arguments.rehearse else REAL
        numbers = arguments.process, arguments.processes, arguments.begin
        return steps.run(arguments.step, plan, arguments.out, *numbers)
    return _drive(arguments)


def _drive(arguments: argparse.Namespace) -> int:
    # The driver's `finally` has to run where `timeout` ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ.pop("DSKD_FAST_BACKEND", None)
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        # All processes have to find the same library: its name depends on what it is compiled for.
        if capability := _capability():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", capability)

    def command(step: Step, process: int, begin: int) -> list[str]:
        options = ["--step", step.name, "--process", process, "--processes", step.processes, "--begin", begin]
        options += ["--out", arguments.out]
        rehearse = ["--rehearse"] if arguments.rehearse else []
        return [sys.executable, "-m", "bench.gpu", *map(str, options), *rehearse]

    # All of bench/gpu.sh, whose installation took what was spent, stays below ten minutes.
    seconds = min(60 * arguments.minutes, 570 - arguments.spent)
    facts = {
        "rehearsal": arguments.rehearse,
        "minutes": round(seconds / 60, 2),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
    }
    steps, build = [step for step in STEPS if not arguments.only or step.name in arguments.only], BUILD
    if arguments.rehearse:
        # Importing is what takes longest there, and the first extension is the only one that it builds.
        build = BUILD._replace(processes=1)
        steps = [step._replace(processes=2 if step.name == "correct" else 1) for step in steps]
    steps[0] = steps[0]._replace(beside=False)
    driver = Driver(arguments.out, seconds, command, facts)
    has_all = driver.run(steps, build)
    print((arguments.out / TABLE).read_text(encoding="utf-8"))
    return 0 if has_all else 1


def _capability() -> str | None:
    """Such as "9.0", without a context on the GPU, which would hold memory as long as this process lives."""
    if not (program := shutil.which("nvidia-smi")):
        return None
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines and lines[0][0].isdigit() else None


if __name__ == "__main__":
    sys.exit(main())
