"""Trains in child processes that are killed after random times: killed_trainings.py FOLDER N_KILLS TRAIN_ARGUMENTS...

FOLDER/reference is trained without interruption. Then FOLDER/0, FOLDER/1, ... are trained by children of which N_KILLS
are killed, each killed training being resumed by the next child. Prints a line for each child: its run, how it ended,
and what of the run was there.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

from dskd_fast.cli import commands, main  # noqa: E402, F401  (all imports are done once, before children are forked)
from dskd_fast.training.checkpoints import Checkpoints  # noqa: E402

# Where a training was saved must not matter: anywhere.
Checkpoints.is_due = lambda self: self.path is not None and random.random() < 0.4


def child(arguments):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os._exit(main([str(argument) for argument in arguments]))
    return pid


def exit_code(pid, flags=0):
    done, status = os.waitpid(pid, flags)
    return os.waitstatus_to_exitcode(status) if done else None


def trains(run, arguments):
    """A child that trains: anew if there is nothing to go on with."""
    return child(["train", "--resume", run] if (run / "config.json").exists() else ["train", *arguments, "--out", run])


def run_and_kill(folder, n_kills, arguments):
    started = time.perf_counter()
    if exit_code(child(["train", *arguments, "--out", folder / "reference"])) != 0:
        sys.exit("the reference failed")
    duration = time.perf_counter() - started
    times = random.Random(0)
    number, kills = 0, 0
    while True:
        run = folder / str(number)
        pid = trains(run, arguments)
        if kills < n_kills:
            time.sleep(times.uniform(0, duration))
            os.kill(pid, signal.SIGKILL)
        code = exit_code(pid)
        kills += code == -signal.SIGKILL
        there = sorted(path.name for path in run.iterdir()) if run.exists() else []
        print(run.name, code, *there)
        if code not in (0, -signal.SIGKILL):
            sys.exit("a child failed")
        if "calibration.json" in there:  # finished, though it may have been killed after that
            if kills == n_kills:
                return
            number += 1


if __name__ == "__main__":
    run_and_kill(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
