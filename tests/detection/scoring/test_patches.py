"""Distances of patches from those of the training images, by brute force in float64."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist

from dskd_fast.detection.scoring import patches as patches_module
from dskd_fast.detection.scoring.patches import PatchPart, PatchSample

CHANNELS, SIDE = 6, 4


def patches(n, seed=0):
    """Of n images, (n, SIDE, SIDE, C)."""
    return 1 + torch.rand(n, SIDE, SIDE, CHANNELS, generator=torch.Generator().manual_seed(seed))


def sample_of(*batches):
    sample = PatchSample()
    for batch in batches:
        sample.add(batch)
    return sample


def fitted(*batches):
    part = PatchPart()
    part.fit(sample_of(*batches))
    return part


def numbers(x):
    return x.double().flatten(0, -2).numpy()


def assert_are_distances(found, new, bank):
    """Their squares are differences of float32 numbers as large as the patches' own squares."""
    new, bank = numbers(new), numbers(bank)
    expected = cdist(new, bank).min(1).reshape(found.shape)
    largest = (new**2).sum(1).max() + (bank**2).sum(1).max()
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.double() ** 2, expected**2, atol=4 * np.finfo(np.float32).eps * largest)


@pytest.mark.parametrize(("least", "most", "n"), [(2, 30, 8), (2, 7, 7), (9, 30, 9), (100, 999, 5 * SIDE**2)])
def test_a_tenth_is_kept_within_limits_and_distances_are_those_from_the_nearest_of_them(monkeypatch, least, most, n):
    monkeypatch.setattr(patches_module, "MIN_KEPT", least)
    monkeypatch.setattr(patches_module, "MAX_KEPT", most)
    training, new = patches(5), patches(3, seed=1)
    part = fitted(*training.split((2, 3)))
    assert {*map(tuple, part.bank.tolist())} <= {*map(tuple, training.flatten(0, 2).tolist())}
    assert len(part.bank) == n
    assert_are_distances(part.distances(new), new, part.bank)


def test_many_channels_are_compared_along_principal_axes_and_by_the_length_of_the_rest(monkeypatch):
    monkeypatch.setattr(patches_module, "_N_COMPARED", 4)
    training, new = patches(5), patches(3, seed=1)
    part = fitted(training)
    rows, images = numbers(training), numbers(new)
    origin = rows.mean(0)
    axes = np.linalg.svd(rows - origin, full_matrices=False)[2][:3].T

    def compared(x):
        along = (x - origin) @ axes
        rest = np.linalg.norm(x - origin - along @ axes.T, axis=1)
        return torch.from_numpy(np.column_stack([along, rest]))

    found = part.distances(new)
    assert_are_distances(found, compared(images), compared(rows))
    # The rest, a difference of squares, is known to half of the digits.
    assert (found.numpy() <= cdist(images, rows).min(1).reshape(found.shape) + 1e-3).all()


def test_kept_patches_cover_the_sample_better_than_random_ones(monkeypatch):
    monkeypatch.setattr(patches_module, "MAX_KEPT", 30)
    generator = np.random.default_rng(0)
    # Of many channels they have few dimensions, as features do, and the farther from the middle, the fewer they are.
    training = (generator.normal(size=(640, 3)) ** 3 @ generator.normal(size=(3, 90))).astype(np.float32)

    def farthest(bank):
        return cdist(training, bank).min(1).max()

    ours = farthest(fitted(torch.from_numpy(training).reshape(40, SIDE, SIDE, 90)).bank)
    assert all(ours <= farthest(generator.choice(training, 30, replace=False)) for _ in range(20))


def test_beside_a_patch_that_is_far_longer_none_is_taken_for_a_copy():
    training = patches(5)
    training[0, 0, 0] *= 300
    assert len(fitted(training).bank) == 5 * SIDE**2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_training_image_is_compared_with_the_others_alone(batch_size):
    training = patches(5)
    part = fitted(training)
    found = [part.distances(training[i : i + batch_size], i) for i in range(0, 5, batch_size)]
    for i, one in enumerate(torch.cat(found)):
        others = torch.cat([training[:i], training[i + 1 :]])
        assert_are_distances(one, training[i], others)


def numbered(n, first=0):
    """Patches (n, SIDE, SIDE, 3) that say which image, row and column they are of."""
    return first * torch.eye(3)[0] + torch.cartesian_prod(*map(torch.arange, (n, SIDE, SIDE))).view(n, SIDE, SIDE, 3)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_of_any_number_of_images_as_many_patches_are_held_as_may_be(monkeypatch, batch_size):
    monkeypatch.setattr(patches_module, "MAX_PATCHES", 100)
    sample = PatchSample()
    for first in range(0, 200, batch_size):
        sample.add(numbered(batch_size, first))
        assert len(sample.patches()) == min(100, (first + batch_size) * SIDE**2)
    # Not only those of some images are kept.
    assert len(sample.images().unique()) > 20


@pytest.mark.parametrize("limit", [100, patches_module.MAX_PATCHES])
def test_batches_do_not_matter_to_the_sample_and_numbers_of_images_stay_with_their_patches(monkeypatch, limit):
    monkeypatch.setattr(patches_module, "MAX_PATCHES", limit)
    one, other = (sample_of(*numbered(31).split(sizes)) for sizes in (1, (3, 1, 20, 7)))
    assert torch.equal(one.patches(), other.patches())
    assert other.images().tolist() == other.patches()[:, 0].tolist()


@pytest.mark.parametrize("is_earlier", [False, True])
@pytest.mark.parametrize("load", ["load", "load_state_dict"])
def test_zeros_beyond_the_border_count_as_published_but_not_in_runs_of_earlier_versions(
    make_calibrated, random_images, is_earlier, load
):
    detector = make_calibrated()
    state = detector.calibrated.state_dict()
    if is_earlier:
        del state["parts.patches.counts_beyond"]
    getattr(detector.calibrated, load)(state)
    images = torch.from_numpy(random_images(2))
    with torch.no_grad():
        second = detector.model.teacher(images / 255)[1].double().numpy()
    window = np.ones((3, 3))
    n = ndimage.convolve(np.ones(second.shape[2:]), window, mode="constant") if is_earlier else 9
    expected = ndimage.convolve(second, window[None, None], mode="constant") / n
    found = detector.measured(images).patches[..., : second.shape[1]].permute(0, 3, 1, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
