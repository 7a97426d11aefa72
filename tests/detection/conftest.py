import numpy as np
import pytest
import torch

from dskd_fast.detection.calibration import Scoring
from dskd_fast.detection.detector import Detector
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
