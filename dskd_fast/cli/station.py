"""The commands of a station on a line: watch and serve."""

import argparse
import importlib.util
import signal
import socket
import sys

from dskd_fast.cli.display import messages, print_line, print_no_decisions
from dskd_fast.errors import UserError
from dskd_fast.evaluation.evaluate import threshold_of
from dskd_fast.runs.folder import load_run
from dskd_fast.station.watch import watch as watch_folder
from dskd_fast.training.checkpoints import stopping_signal

_PACKAGES = ("fastapi", "uvicorn")
# Seconds for which requests are still answered after a signal.
_GRACE = 10


def watch(arguments: argparse.Namespace) -> int:
    detector, _, _ = load_run(arguments.run, arguments.device)
    threshold = threshold_of(detector, arguments.threshold)
    if threshold is None:
        raise UserError(
            f"{arguments.run} has no threshold to decide with, since it had no validation images: pass --threshold"
        )
    with (
        messages(is_aside=True),
        stopping_signal(True, "stopping after the image in hand (Ctrl-C again: at once)") as is_stopped,
    ):
        watch_folder(
            detector,
            arguments.folder,
            arguments.out,
            threshold=threshold,
            emit=lambda line: print(line, flush=True),
            is_stopped=is_stopped,
            overlays=arguments.overlays,
            overlay_format=arguments.overlay_format,
            poll=arguments.poll,
        )
    return 0


def serve(arguments: argparse.Namespace) -> int:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'serve needs {", ".join(missing)}, not installed here: run pip install "dskd-fast[serve]"')
    import uvicorn

    from dskd_fast.station.service import make_app

    detector, _, config = load_run(arguments.run, arguments.device)
    threshold = threshold_of(detector, arguments.threshold)
    if threshold is None:
        print_no_decisions()
    app = make_app(detector, run=config["category"], threshold=threshold, max_bytes=arguments.max_bytes)
    # Before the server, which ends the process where it cannot.
    with _listening(arguments.host, arguments.port) as listener:
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print_line(f"serving {arguments.run} at http://{host}:{listener.getsockname()[1]}/; Ctrl-C or SIGTERM ends it")
        sys.stdout.flush()
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=_GRACE
        )
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            # It handles these signals itself, and raises them again when it has ended, which is then no failure.
            uvicorn.Server(settings).run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(
            f"{host} is no address of this machine ({error.strerror or error}): pass another --host"
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen at {host}, port {port} ({error.strerror or error}): pass another --host or --port"
        ) from None
    return listener
