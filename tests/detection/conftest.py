import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as nnf

from dskd_fast import functional
from dskd_fast.detection.calibration import Calibration, Scoring, Statistics, Threshold
from dskd_fast.detection.detector import Detector
from dskd_fast.detection.export import TOLERANCE
from dskd_fast.detection.scoring.calibrated import CalibratedScore
from dskd_fast.models import DSKD


@pytest.fixture(scope="session")
def random_images():
    """Noise, uint8 (n, 3, height, width): random_images(n, height, width)."""

    def make(n, height=64, width=64, seed=0):
        return np.random.default_rng(seed).integers(0, 256, (n, 3, height, width), dtype=np.uint8)

    return make


@pytest.fixture(scope="session")
def make_calibrated(random_images):
    """A detector with random networks, calibrated on noise: its maps and scores are those of any other."""

    def make(source="validation", n=6, scoring=None, **networks):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = DSKD("test_resnet", image_size=64, pretrained=False, **{"gccb": 8} | networks).eval()
        scoring = Scoring(**{"temperature": 1.0, "sigma": 1.5} | (scoring or {}))
        detector = Detector(model, scoring, calibrated=CalibratedScore(model, scoring.sigma))
        normal, training = (torch.from_numpy(random_images(k, seed=seed)) for seed, k in enumerate((n, 8)))
        detector.calibrate(normal.split(4), source, training=[training])
        return detector

    return make


class SmallNetworks(nn.Module):
    """Stands in for DSKD: one level, one convolution per network."""

    image_size = 32

    def __init__(self, branches=("local", "global")):
        super().__init__()
        self.branches = self.students = branches
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolutions = nn.ModuleList(nn.Conv2d(3, 12, 4, stride=4) for _ in range(3))
        self.teacher = nn.Module()
        self.teacher.name = "small"
        self.teacher.register_buffer("mean", torch.zeros(1))

    @torch.no_grad()
    def anomaly_maps(self, images, temperature, *, align_corners, **kinds):
        teacher, local, global_ = (convolution(images).relu() for convolution in self.convolutions)
        maps = functional.cosine_distance(local, teacher), functional.contextual_affinity(global_, teacher, temperature)
        return tuple(
            nnf.interpolate(m[:, None], images.shape[-2:], mode="bilinear", align_corners=align_corners)[:, 0]
            if name in self.branches
            else None
            for name, m in zip(("local", "global"), maps, strict=True)
        )


def small_detector(threshold=None, exposure=None, **scoring):
    statistics = {"local": Statistics(0.3, 0.02), "global": Statistics(1e-3, 5e-4)}
    limit = None if threshold is None else Threshold(threshold, "", 1, 0.5)
    scoring = Scoring(**{"temperature": 1.0, "sigma": 1.5} | scoring)
    return Detector(SmallNetworks(), scoring, Calibration(statistics, "validation", 1, limit, exposure=exposure))


def module_run(module):
    return lambda images: {name: x.numpy() for name, x in module(torch.from_numpy(images)).items()}


def assert_agrees(found, detections, threshold):
    """Within the stated tolerance; decisions must not differ where the scores are farther from the threshold."""
    scores = np.array([one.score for one in detections])
    maps = np.stack([one.map for one in detections])
    parts = np.array([list(one.parts.values()) for one in detections])
    for name, expected in (("score", scores), ("map", maps), ("parts", parts)):
        assert (found[name].dtype, found[name].shape) == (np.float32, expected.shape)
        assert (np.abs(found[name] - expected) <= TOLERANCE * (1 + np.abs(expected))).all()
    if threshold is None:
        return
    assert found["anomalous"].dtype == np.bool_
    clear = np.abs(scores - threshold) > TOLERANCE * (1 + np.abs(scores))
    assert (found["anomalous"] == (scores > threshold))[clear].all()
