"""Each method on toy images: what it must find, and what it keeps."""

import pytest
import torch

from dskd_fast.choices import METHODS
from dskd_fast.metrics.auroc import auroc
from dskd_fast.models.teacher import Teacher
from dskd_fast.paper.baselines import make_baseline
from dskd_fast.paper.baselines.ae import Autoencoder
from dskd_fast.paper.baselines.f_anogan import FAnoGan
from dskd_fast.paper.baselines.fitting import Fitting
from dskd_fast.paper.baselines.gcad import Gcad
from dskd_fast.paper.baselines.mnad import ITEMS, Mnad
from dskd_fast.paper.baselines.neighbours import nearest
from dskd_fast.paper.baselines.patchcore import NEIGHBOURS, PatchCore, coreset, patches_of
from dskd_fast.paper.baselines.protocol import Baseline
from dskd_fast.paper.baselines.spade import Spade
from dskd_fast.paper.baselines.us import UninformedStudents
from dskd_fast.paper.baselines.vae import VariationalAutoencoder
from dskd_fast.paper.baselines.vm import VariationModel

from ...conftest import TINY_TEACHER
from .conftest import CHANNELS, SIZE, images_of

SMALL = {"side": 32, "widths": (16, 32, 32)}
# How each is made for these images, and the DSKD steps that it needs.
MAKERS = {
    "vm": (lambda: VariationModel(SIZE, CHANNELS), 1),
    "spade": (lambda: Spade(SIZE, CHANNELS), 1),
    "patchcore-25": (lambda: PatchCore(SIZE, CHANNELS), 1),
    "ae": (lambda: Autoencoder(SIZE, CHANNELS, **SMALL), 16),
    "vae": (lambda: VariationalAutoencoder(SIZE, CHANNELS, **SMALL), 16),
    "mnad": (lambda: Mnad(SIZE, CHANNELS, side=32), 16),
    "f-anogan": (lambda: FAnoGan(SIZE, CHANNELS, side=16, widths=(16, 32)), 24),
    "us": (lambda: UninformedStudents(SIZE, CHANNELS), 10),
    "gcad": (lambda: Gcad(SIZE, CHANNELS), 14),
}


@pytest.fixture(scope="module")
def fitted(toy):
    """Each method, fitted once: fitted(name)."""
    made: dict[str, Baseline] = {}

    def fit(name):
        if name not in made:
            make, steps = MAKERS[name]
            with torch.random.fork_rng(), torch.enable_grad():
                torch.manual_seed(0)
                made[name] = make()
                made[name].fit(toy.train, toy.validation, Fitting(steps, 8))
        return made[name]

    return fit


def test_every_method_of_the_tables_is_here():
    assert {*MAKERS} == {*METHODS} - {"dskd", "rd"}
    teacher = Teacher(TINY_TEACHER)
    for name in MAKERS:
        assert type(make_baseline(name, SIZE, teacher)) is type(MAKERS[name][0]())


@torch.no_grad()
@pytest.mark.parametrize("name", MAKERS)
def test_a_planted_defect_is_found_and_located(fitted, toy, name):
    method = fitted(name)
    of_good, of_bad = method.maps(toy.good), method.maps(toy.bad)
    assert of_bad.shape == (len(toy.bad), SIZE, SIZE)
    assert of_bad.dtype == torch.float32
    assert torch.isfinite(of_bad).all()
    good, bad = method.score(toy.good, of_good).tolist(), method.score(toy.bad, of_bad).tolist()
    assert auroc(good, bad) > 0.9, (good, bad)
    assert auroc(of_bad[~toy.inside].tolist(), of_bad[toy.inside].tolist()) > 0.8


@torch.no_grad()
@pytest.mark.parametrize("name", MAKERS)
def test_what_it_keeps_gives_the_same_maps_whatever_the_batch(fitted, toy, name):
    method, again = fitted(name), MAKERS[name][0]()
    again.restore(method.state_dict())
    expected = method.maps(toy.bad)
    scores = method.score(toy.bad, expected)
    for i in (0, 5):
        one = toy.bad.of([i])
        maps = again.maps(one)
        # Products of other shapes are summed in another order.
        torch.testing.assert_close(maps[0], expected[i], rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        torch.testing.assert_close(again.score(one, maps)[0], scores[i], rtol=1e-3, atol=1e-5)


def test_the_variation_model_is_mean_and_deviation_of_grey_values():
    pixels = torch.rand(7, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    pixels[:, :, 0, 0] = 0.5  # never varies
    model = VariationModel(SIZE, CHANNELS)
    model.fit(images_of(pixels.float()), images_of(pixels.float()), Fitting(1, 4))
    grey = 0.299 * pixels[:, 0] + 0.587 * pixels[:, 1] + 0.114 * pixels[:, 2]
    deviation = grey.std(0, correction=0).clamp(min=1 / 255)
    # Rounding of float32 numbers below 1 before a division by a deviation.
    tolerance = float(8 * 2**-24 * (1 + (grey / deviation).max()) / deviation.min())
    found = model.maps(images_of(pixels.float())).double()
    torch.testing.assert_close(found, (grey - grey.mean(0)).abs() / deviation, rtol=0, atol=tolerance)


@torch.no_grad()
def test_a_patch_of_the_memory_has_no_distance_and_the_weight_of_a_score_is_equation_7(fitted, toy):
    method = fitted("patchcore-25")
    assert nearest(method.memory, method.memory).distances.max() == 0
    patches = patches_of(toy.bad.features).flatten(1, 2).double()
    memory = method.memory.double()
    for i, score in enumerate(method.score(toy.bad, method.maps(toy.bad)).tolist()):
        distances = torch.cdist(patches[i], memory, compute_mode="donot_use_mm_for_euclid_dist")
        patch = distances.min(1).values.argmax()
        item = distances[patch].argmin()
        around = torch.cdist(memory[item][None], memory)[0].topk(NEIGHBOURS, largest=False).indices
        weight = 1 - distances[patch, item].exp() / distances[patch, around].exp().sum()
        assert score == pytest.approx(float(weight * distances[patch, item]), rel=1e-4)


def test_the_coreset_covers():
    """Of as many clusters as it has places for it takes one point each, however many points a cluster has."""
    centres = 10 * torch.randn(20, 30, generator=torch.Generator().manual_seed(3))
    cluster = torch.cat([torch.arange(20), torch.zeros(400, dtype=torch.long)])
    points = centres[cluster] + 0.001 * torch.arange(420)[:, None]
    assert sorted(cluster[coreset(points, 20, Fitting(1, 1))].tolist()) == list(range(20))
    assert len(coreset(torch.ones(10, 4), 5, Fitting(1, 1))) == 1


@torch.no_grad()
def test_a_training_image_is_its_own_nearest(fitted, toy):
    method = fitted("spade")
    some = toy.train.of([3])
    assert method.maps(some).max() == 0
    pooled = [x.features[-1].mean((2, 3)).double() for x in (toy.bad, toy.train)]
    expected = torch.cdist(*pooled).mean(1)  # there are fewer than the 50 that count
    torch.testing.assert_close(method.score(toy.bad, method.maps(toy.bad)).double(), expected, rtol=1e-4, atol=0)


def test_memory_losses_weigh_little_beside_the_reconstruction_and_items_are_used(fitted, toy):
    """As in the published code: 0.01 times a mean over all numbers, and 0.01 times a triplet margin of distances."""
    torch.manual_seed(0)
    method, trained = MAKERS["mnad"][0](), fitted("mnad")
    inputs = method.inputs(toy.train)
    with torch.no_grad():
        queries = method._queries(inputs)
        distances = torch.cdist(queries.flatten(0, 2), method.items).topk(2, largest=False).values
        error = (method._recalled(queries) - inputs).square().mean()
        compactness = distances[:, 0].square().mean() / queries.shape[-1]
        separateness = (distances[:, 0] - distances[:, 1] + 1).clamp(min=0).mean()
        expected = error + 0.01 * (compactness + separateness)
        nearest_items = trained._queries(inputs).flatten(0, 2).matmul(trained.items.mT).argmax(1)
    # In training mode, as the expected one: batch statistics.
    torch.testing.assert_close(method._loss(toy.train).detach(), expected, rtol=1e-4, atol=0)
    assert len(nearest_items.unique()) >= 2
    torch.testing.assert_close(trained.items.norm(dim=1), torch.ones(ITEMS))
    assert not torch.allclose(method.items, trained.items, atol=0.1)


@torch.no_grad()
def test_a_score_of_mnad_is_of_the_whole_image(fitted, toy):
    """0.7 of the signal-to-noise ratio and 0.3 of the mean distance, each in deviations over validation images."""
    method = fitted("mnad")

    def of(images):
        errors, distances = method._errors_and_distances(images).double().mean((2, 3)).unbind(1)
        return -10 * (4 / errors).log10(), distances

    pairs = zip(of(toy.bad), of(toy.validation), strict=True)
    ratio, distance = ((found - normal.mean()) / normal.std() for found, normal in pairs)
    expected = 0.7 * ratio + 0.3 * distance
    torch.testing.assert_close(method.score(toy.bad, method.maps(toy.bad)).double(), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "both", "normalisers"),
    [
        ("us", "_errors_and_variances", ("of_errors", "of_variances")),
        ("gcad", "_local_and_global", ("of_local", "of_global")),
        ("mnad", "_errors_and_distances", ("of_errors", "of_distances")),
    ],
)
def test_both_maps_are_in_deviations_over_the_validation_images(fitted, toy, name, both, normalisers):
    method = fitted(name)
    for normaliser, maps in zip(normalisers, getattr(method, both)(toy.validation).unbind(1), strict=True):
        normalised = getattr(method, normaliser)(maps).double()
        assert float(normalised.mean()) == pytest.approx(0, abs=1e-4)
        assert float(normalised.std()) == pytest.approx(1, abs=1e-4)
