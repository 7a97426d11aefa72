"""Photographs over HTTP: `serve` beside `Detector.predict`, one at a time and many, on the same files.

The server and its clients are threads of one process and share its cores, as on a station; the clients' part, which is
to send bytes and read JSON, is small. A row's time is that of all photographs; the time within which 95 % of the
requests were answered is of all rounds. The networks' weights are random: the work is the same. Before it is timed, the
service has to give the scores of `predict` within rounding.
"""

import functools
import http.client
import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from bench.lab import row
from bench.work import BATCH, N_PHOTOGRAPHS
from dskd_fast.detection.detector import Detector

_SIZE, _SIDE = (1600, 1280), 128
_DIRECT, _DIRECT_SINGLY = "Detector.predict", "Detector.predict, one by one"
_CLIENTS = {"dskd-fast serve, 1 client": 1, "dskd-fast serve, 8 clients": 8}
# float32 rounding depends on the batch, and random networks' calibrated scores spread it.
_TOLERANCE = 1e-3


class Case(NamedTuple):
    contestant: str

    @property
    def id(self) -> str:
        return self.contestant

    @property
    def group(self) -> str:
        return f"{N_PHOTOGRAPHS} PNGs of {_SIZE[0]} x {_SIZE[1]}, lite, {_SIDE} px, over HTTP"

    def row(self) -> dict:
        return row(
            "serve",
            self.group,
            "serve",
            self.contestant,
            ours=True,
            reference=self.contestant == _DIRECT,
            images=N_PHOTOGRAPHS,
        )


def cases(is_full: bool) -> list[Case]:
    full = [Case(name) for name in (_DIRECT, _DIRECT_SINGLY, *_CLIENTS)]
    return full if is_full else [full[0], full[-1]]


def test_serve(benchmark, lab, case, files, detectors):
    info = case.row()
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        lab.leave_out(info, case.group, f'{", ".join(missing)} is not installed: pip install -e ".[serve]"')
    lab.leave_out_of_quick(case)
    paths, detector = files(_SIZE), detectors(_SIDE, lab.device)
    direct = functools.partial(detector.predict, paths, batch_size=BATCH)
    if case.contestant == _DIRECT:
        lab.time(benchmark, case.group, info, direct)
        return
    seconds: list[float] = []
    if case.contestant == _DIRECT_SINGLY:

        def singly() -> None:
            for path in paths:
                started = time.perf_counter()
                detector.predict(path)
                seconds.append(time.perf_counter() - started)

        lab.time(benchmark, case.group, info, singly, reference=direct)
    else:
        bodies = [path.read_bytes() for path in paths]
        with _served(detector) as port, ThreadPoolExecutor(_CLIENTS[case.contestant]) as pool:
            post = functools.partial(_post, port, seconds)
            scores = list(pool.map(post, bodies))
            if not np.allclose(scores, [found.score for found in direct()], rtol=_TOLERANCE, atol=_TOLERANCE):
                lab.leave_out(info, case.group, "it is wrong: its scores are not those of Detector.predict")
            seconds.clear()
            lab.time(benchmark, case.group, info, lambda: list(pool.map(post, bodies)), reference=direct)
    info["p95_seconds"] = float(np.percentile(seconds, 95))


def _post(port: int, seconds: list[float], body: bytes) -> float:
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/predict", body)
    score = json.load(connection.getresponse())["score"]
    connection.close()
    seconds.append(time.perf_counter() - started)
    return score


@contextmanager
def _served(detector: Detector) -> Iterator[int]:
    import uvicorn

    from dskd_fast.station.service import make_app

    app = make_app(detector, run="benchmark", threshold=None, max_bytes=2**26)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
