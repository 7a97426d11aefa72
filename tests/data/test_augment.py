import dataclasses
import math

import pytest
import torch
from torchvision.transforms import functional as reference

from dskd_fast.data.augment import _CATEGORIES, Augmentation, for_category
from dskd_fast.errors import UserError

EVERYTHING = Augmentation(True, True, 3.0, 0.1, 0.1, 0.1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.rand((16, 3, 24, 24), generator=seeded(99))


@pytest.mark.parametrize("field", [None, *(field.name for field in dataclasses.fields(Augmentation))])
def test_each_setting_acts_draws_from_its_generator_alone_and_leaves_its_input_alone(images, field):
    before, global_state = images.clone(), torch.get_rng_state()
    augment = Augmentation(**{field: True if field.endswith("flip") else 1.0} if field else {})
    generator = seeded()
    result = augment(images, generator)
    assert torch.equal(images, before)
    assert result.data_ptr() != images.data_ptr()
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    assert 0 <= result.min() <= result.max() <= 1
    assert torch.equal(result, augment(images, seeded()))
    assert torch.equal(torch.get_rng_state(), global_state)
    for same in (torch.equal(result, x) for x in (images, augment(images, generator), augment(images, seeded(1)))):
        assert same == (field is None)


def test_flips_are_exact_independent_and_happen_half_of_the_time():
    images = torch.rand((4000, 3, 4, 4), generator=seeded(99))
    both = Augmentation(horizontal_flip=True, vertical_flip=True)(images, seeded())
    for result, candidates in (
        (Augmentation(horizontal_flip=True)(images, seeded()), [images, images.flip(3)]),
        (Augmentation(vertical_flip=True)(images, seeded()), [images, images.flip(2)]),
        (both, [images, images.flip(3), images.flip(2), images.flip(2, 3)]),
    ):
        counts = [(result == candidate).flatten(1).all(dim=1).sum().item() for candidate in candidates]
        assert sum(counts) == 4000
        # Binomial: standard deviation at most 31.6; five of these on either side.
        assert all(abs(count - 4000 / len(candidates)) < 158 for count in counts)


def is_uniform(values, low, high):
    """Within [low, high] up to rounding, and by Kolmogorov and Smirnov at about 1e-6: D < 2.7 / sqrt(n)."""
    n = len(values)
    ordered = ((values - low) / (high - low)).sort().values
    steps = torch.arange(n + 1) / n
    distance = max((ordered - steps[:-1]).abs().max().item(), (ordered - steps[1:]).abs().max().item())
    return ordered.min() >= -1e-3 and ordered.max() <= 1 + 1e-3 and distance < 2.7 / math.sqrt(n)


def test_the_factors_of_jitter_are_uniform():
    # A pixel of three values, and a lighter one below it.
    images = torch.tensor([[0.4, 0.5], [0.5, 0.6], [0.6, 0.7]]).view(1, 3, 2, 1).expand(2000, 3, 2, 2)
    for name, measure in (
        ("brightness", lambda x: x[:, 0, 0, 0]),
        ("contrast", lambda x: x[:, 0, 1, 0] - x[:, 0, 0, 0]),
        ("saturation", lambda x: x[:, 2, 0, 0] - x[:, 0, 0, 0]),
    ):
        result = Augmentation(**{name: 0.3})(images, seeded())
        assert is_uniform(measure(result) / measure(images), 0.7, 1.3), name


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_is_torchvisions_at_some_factor_per_image(images, name):
    images = images[:8]
    result = Augmentation(**{name: 0.5})(images, seeded())
    adjust = getattr(reference, f"adjust_{name}")
    factors = [0.5 + i / 500 for i in range(501)]
    errors = torch.stack([(adjust(images, factor) - result).abs().amax((1, 2, 3)) for factor in factors])
    # Half a step of the search, 1/1000, times a difference of at most 1.
    assert (errors.amin(0) < 1.1e-3).all()
    assert len(errors.argmin(0).unique()) > 4


def test_rotation_moves_a_blob_as_the_rotation_matrix_says_and_reflects_the_border():
    size = 65
    y, x = torch.meshgrid(torch.arange(size) - 32.0, torch.arange(size) - 32.0, indexing="ij")
    blob = torch.exp(-((x - 20) ** 2 + y**2) / 8).expand(300, 3, size, size)
    result = Augmentation(rotation=10)(blob, seeded())[:, 0]
    mass = result.sum(dim=(1, 2))
    centre_x, centre_y = (result * x).sum(dim=(1, 2)) / mass, (result * y).sum(dim=(1, 2)) / mass
    assert torch.allclose(torch.hypot(centre_x, centre_y), torch.tensor(20.0), atol=0.1)
    assert is_uniform(torch.atan2(-centre_y, centre_x).rad2deg(), -10, 10)
    bright = torch.full((8, 3, 33, 33), 0.8)
    assert torch.allclose(Augmentation(rotation=45)(bright, seeded()), bright, atol=1e-5)


def test_no_category_gets_a_change_that_breaks_its_logic():
    names = "breakfast_box juice_bottle splicing_connectors cable capsule metal_nut pill"
    for augment in (for_category(name, "paper") for name in names.split()):
        assert not augment.horizontal_flip
        assert not augment.vertical_flip
    assert all(0 < augment.rotation <= 3 for augment in _CATEGORIES.values())
    assert for_category("my own part", "fast") == Augmentation()
    assert for_category("my own part", "paper") == Augmentation(brightness=0.05, contrast=0.05, saturation=0.05)


@pytest.mark.parametrize(
    ("text", "expected", "normal_form"),
    [
        (" NONE ", Augmentation(), "none"),
        ("rotate=0", Augmentation(), "none"),
        ("hflip,vflip,rotate=3,brightness=0.1,contrast=0.1,saturation=0.1", EVERYTHING, None),
        (" VFlip , Rotate = 180 ", Augmentation(vertical_flip=True, rotation=180), "vflip,rotate=180"),
        ("contrast=1e-17", Augmentation(contrast=1e-17), None),
        (f"rotate={1 / 3},saturation=1", Augmentation(rotation=1 / 3, saturation=1), None),
    ],
)
def test_parse_and_its_inverse(text, expected, normal_form):
    assert Augmentation.parse(text) == expected
    assert expected.to_text() == (normal_form or text)
    assert Augmentation.parse(expected.to_text()) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "'': accepted is .*hflip") for text in ("", "hflip,")),
        *((text, f"'{text}': accepted is .*rotate=DEGREES") for text in ("flip", "hflip=1", "rotate")),
        ("hflip,none", "'none': accepted"),
        *((f"vflip,rotate={x}", f"'rotate={x}': rotate takes .* 0 to 180") for x in ("", "x", "181", "nan")),
        *((text, f"'{text}': .*0 to 1") for text in ("brightness=-0.1", "contrast=inf", "saturation=1.1")),
        ("hflip,rotate=3,hflip", "'hflip' is given twice"),
    ],
)
def test_parse_names_the_bad_token_and_what_is_accepted(text, message):
    with pytest.raises(UserError, match=message):
        Augmentation.parse(text)
