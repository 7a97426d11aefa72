"""From arguments to an exit code. What the commands do is in `dskd_fast.cli.commands`."""

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from dskd_fast.choices import MAX_PIXELS
from dskd_fast.cli.parser import make_parser
from dskd_fast.errors import PeerFailed, TrainingStopped, UserError
from dskd_fast.files import printable


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0; 1 if the work is done but for some files that could not be used: images that `predict` did not inspect, masks
    without which `evaluate`, `evaluate-maps` and `report` have no sPRO; 2 for an error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may hold what the terminal's encoding does not.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = make_parser().parse_args(argv)
    _share_cores()
    with _terminated_by_exception():
        return _run(arguments)


def _share_cores() -> None:
    """Have OpenMP's threads wait for each other for microseconds before they sleep, unless the user says how.

    As it is they spin for milliseconds at every barrier, which takes the core from the thread that they wait for where
    other programs, or threads that read and draw, want it. Only what is set before torch is imported counts.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class _Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


@contextlib.contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Make SIGTERM an exception, so that `timeout` or a service manager leaves no file half written."""

    def stop(*_: Any) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(arguments: argparse.Namespace) -> int:
    try:
        # Imported late: --help and a wrong argument need no torch.
        from dskd_fast.cli import commands
        from dskd_fast.data.images import pixel_limit
        from dskd_fast.training.distributed import launched_as

        rank, size = launched_as()
        if size > 1 and arguments.command != "train":
            if rank > 0:
                raise PeerFailed
            raise UserError(f"{arguments.command} is one process: call it without torchrun")
        with pixel_limit(getattr(arguments, "max_pixels", None) or MAX_PIXELS):
            return getattr(commands, arguments.command.replace("-", "_"))(arguments)
    except TrainingStopped as error:
        print(f"dskd-fast: {printable(error)}", file=sys.stderr)
        return 128 + error.signal
    except PeerFailed as error:
        from dskd_fast.training.distributed import why_peer_failed

        if reason := why_peer_failed(error):
            print(f"dskd-fast: {reason}", file=sys.stderr)
        return 1
    except UserError as error:
        sys.stdout.flush()
        print(f"dskd-fast: {printable(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        from dskd_fast.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        reason = printable((str(error).splitlines() or ["no details"])[0][:150])
        print(f"dskd-fast: out of memory ({reason}): lower --batch-size or --image-size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dskd-fast: interrupted; no file was left half written", file=sys.stderr)
        return 128 + signal.SIGINT
    except _Terminated:
        print("dskd-fast: terminated; no file was left half written", file=sys.stderr)
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        # The reader of our output has gone, as in `| head`; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        what = printable(f"{error.filename or 'the system'} cannot be used: {error.strerror or error}")
        print(f"dskd-fast: {what}", file=sys.stderr)
        return 2
