"""Models of anomalib by the same protocol; ours beside theirs on the same features, where anomalib is installed."""

import importlib.util

import numpy as np
import pytest
import torch
from torch.nn import functional as nnf

from dskd_fast.errors import UserError
from dskd_fast.models.dskd import enlarged
from dskd_fast.models.teacher import Teacher
from dskd_fast.paper.baselines import make_baseline
from dskd_fast.paper.baselines.fitting import Fitting
from dskd_fast.paper.baselines.patchcore import filtered
from dskd_fast.paper.baselines.protocol import Images

from .conftest import SIZE

is_installed = importlib.util.find_spec("anomalib") is not None


@pytest.mark.skipif(is_installed, reason="anomalib is installed")
def test_without_anomalib_a_sentence_says_what_to_install(tiny_weights):
    with pytest.raises(UserError, match=r'which is not installed: pip install "dskd-fast\[baselines\]"'):
        make_baseline("anomalib:Patchcore", SIZE, Teacher("test_resnet"), str(tiny_weights))


@pytest.fixture(scope="module")
def seen(toy, tmp_path_factory):
    """A ResNet-18 with random weights in a file, and the toy images with its features."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = Teacher("resnet18")
        file = tmp_path_factory.mktemp("weights") / "resnet18.pt"
        import timm

        torch.save(timm.create_model("resnet18").state_dict(), file)
    teacher.load_weights(file)
    of = [Images(x._pixels, lambda n, x=x: teacher(x._pixels(n)), range(len(x))) for x in toy[:4]]
    return teacher, str(file), of


@torch.no_grad()
@pytest.mark.skipif(not is_installed, reason='anomalib is not installed: pip install -e ".[baselines]"')
def test_patchcore_agrees_with_anomalibs_on_the_same_features(seen):
    """Coresets of other projections cover the same patches: maps of one rank the pixels as those of the other."""
    teacher, weights, (train, validation, good, bad) = seen
    found = {}
    for name in ("patchcore-25", "anomalib:Patchcore"):
        torch.manual_seed(0)
        method = make_baseline(name, SIZE, teacher, weights)
        if name.startswith("anomalib"):
            method.module.coreset_sampling_ratio = 0.25
        with torch.enable_grad():
            method.fit(train, validation, Fitting(1, 8))
        maps = [method.maps(images) for images in (good, bad)]
        scores = [method.score(images, m) for images, m in zip((good, bad), maps, strict=True)]
        found[name] = torch.cat(maps).double(), torch.cat(scores).double()
    (ours, our_scores), (theirs, their_scores) = found.values()
    assert np.corrcoef(ours.flatten(), theirs.flatten())[0, 1] > 0.97
    assert np.corrcoef(our_scores, their_scores)[0, 1] > 0.95


@torch.no_grad()
@pytest.mark.skipif(not is_installed, reason='anomalib is not installed: pip install -e ".[baselines]"')
def test_padim_is_the_distance_from_each_position_in_the_features_of_all_methods(seen):
    """Mahalanobis, in float64, in the channels that it has drawn; then enlarged and filtered."""
    teacher, weights, (train, validation, _, bad) = seen
    method = make_baseline("anomalib:Padim", SIZE, teacher, weights)
    with torch.enable_grad():
        method.fit(train, validation, Fitting(1, 8))

    def drawn(images):
        finest = images.features[0].shape[-2:]
        levels = [nnf.interpolate(x, finest, mode="nearest") for x in images.features]
        return torch.cat(levels, 1)[:, method.module.model.idx].double().permute(2, 3, 0, 1)

    sample, queries = drawn(train), drawn(bad)
    mean = sample.mean(2, keepdim=True)
    covariance = (sample - mean).mT @ (sample - mean) / (len(train) - 1) + (0.01 + 1e-5) * torch.eye(sample.shape[-1])
    difference = queries - mean
    squares = (difference * torch.linalg.solve(covariance, difference.mT).mT).sum(-1)
    expected = filtered(enlarged([squares.sqrt().permute(2, 0, 1)], (SIZE, SIZE))[:, 0], 4)
    found = method.maps(bad).double()
    # Theirs is filtered with the border mirrored in another way.
    inner = slice(16, -16)
    torch.testing.assert_close(found[:, inner, inner], expected[:, inner, inner], rtol=2e-3, atol=0)


@pytest.mark.skipif(not is_installed, reason='anomalib is not installed: pip install -e ".[baselines]"')
@pytest.mark.parametrize(
    ("name", "message"),
    [("Pathcore", "anomalib has no model Pathcore: use one of "), ("WinClip", "anomalib's WinClip cannot be")],
)
def test_what_anomalib_cannot_do_is_said(seen, name, message):
    teacher, weights, _ = seen
    with pytest.raises(UserError, match=message):
        make_baseline(f"anomalib:{name}", SIZE, teacher, weights)
