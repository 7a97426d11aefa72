"""From image files to scores, decisions and heat maps: `predict` and `evaluate` beside what they cannot do without.

Reading the files and running the networks, each alone on all cores, are rows of the same table, and the networks alone
take turns with each of the others: what `predict` takes beyond the slower of the two is what the pipeline does not
hide. The networks' weights are random: the work is the same. Before it is timed, `predict` has to give the scores of
the networks alone, to the bit.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from bench.lab import row
from bench.work import BATCH, N_PHOTOGRAPHS
from dskd_fast.data.images import read_image
from dskd_fast.data.layout import open_category
from dskd_fast.detection.predict import predict
from dskd_fast.evaluation.evaluate import evaluate
from dskd_fast.workers import n_threads

_READING, _NETWORKS = "reading the files alone", "the networks alone"
_PREDICT = "dskd-fast predict"
_CONTESTANTS: dict[str, dict] = {
    _PREDICT: {},
    f"{_PREDICT} --overlays none": {"overlays": "none"},
    f"{_PREDICT} --overlay-format png": {"overlay_format": "png"},
    f"{_PREDICT} --save-maps": {"save_maps": True},
}
_EVALUATE = "dskd-fast evaluate, without masks"
_PYTHON = "Detector.predict"
_ANOMALIB = "anomalib Engine.predict"
# Width and height of the images of MVTec LOCO AD's categories, the first of them breakfast_box's.
_SIZES = ((1600, 1280), (800, 1600), (1700, 1000), (1600, 1100), (1700, 850))


class Case(NamedTuple):
    contestant: str
    size: tuple[int, int] = _SIZES[0]
    side: int = 128

    @property
    def id(self) -> str:
        return f"{self.work}-{self.contestant}"

    @property
    def work(self) -> str:
        return f"{N_PHOTOGRAPHS} PNGs of {self.size[0]} x {self.size[1]}, lite, {self.side} px"

    @property
    def group(self) -> str:
        return self.work

    def row(self) -> dict:
        return row(
            "predict",
            self.work,
            "predict",
            self.contestant,
            ours=self.contestant in (*_CONTESTANTS, _EVALUATE, _PYTHON),
            reference=self.contestant == _NETWORKS,
            images=N_PHOTOGRAPHS,
        )


def cases(is_full: bool) -> list[Case]:
    contestants = (_READING, _NETWORKS, *_CONTESTANTS, _EVALUATE, _PYTHON, _ANOMALIB)
    if not is_full:
        return [Case(name) for name in (_READING, _NETWORKS, _PREDICT, _EVALUATE)]
    works = [(size, 128) for size in _SIZES] + [(_SIZES[0], 512)]
    return [Case(name, *work) for work in works for name in contestants]


def test_predict(benchmark, lab, case, files, detectors, tmp_path):
    info = case.row()
    if case.contestant == _ANOMALIB:
        lab.leave_out(info, case.group, "it is not written yet: anomalib could not be tried where these were made")
    lab.leave_out_of_quick(case)
    paths, detector = files(case.size), detectors(case.side, lab.device)
    images = [detector.resized(read_image(path)) for path in paths]
    batches = [torch.stack(images[i : i + BATCH]) for i in range(0, N_PHOTOGRAPHS, BATCH)]

    def networks() -> list[float]:
        return [float(score) for batch in batches for score in detector.find(batch).scores["combined"]]

    def read() -> None:
        with ThreadPoolExecutor(n_threads()) as pool:
            # Nothing is kept of the images.
            list(pool.map(lambda path: read_image(path).shape, paths))

    if case.contestant == _NETWORKS:
        lab.time(benchmark, case.group, info, networks)
        return
    if case.contestant == _READING:
        call: Callable[[], object] = read
    elif case.contestant == _EVALUATE:
        category = open_category(paths[0].parents[3], paths[0].parents[2].name)
        call = functools.partial(evaluate, detector, category, threshold=None, batch_size=BATCH)
    elif case.contestant == _PYTHON:
        call = functools.partial(detector.predict, paths, batch_size=BATCH)
    else:
        options = _CONTESTANTS[case.contestant]
        threshold = sorted(networks())[N_PHOTOGRAPHS // 2]
        call = functools.partial(predict, detector, paths, tmp_path, threshold=threshold, batch_size=BATCH, **options)
        if [prediction.score for prediction in call()] != networks():
            lab.leave_out(info, case.group, "it is wrong: its scores are not those of the networks alone")
    lab.time(benchmark, case.group, info, call, reference=networks)
