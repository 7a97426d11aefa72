import dataclasses
import math

import pytest
import torch
from torchvision.transforms import functional as reference

from dskd_fast.data.augment import Augmentation, _rotate, for_category
from dskd_fast.errors import UserError

EVERYTHING = Augmentation(True, True, 3.0, 0.1, 0.1, 0.1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.rand((16, 3, 24, 24), generator=seeded(99))


def test_off_is_the_identity_but_not_the_same_tensor(images):
    result = Augmentation()(images, seeded())
    assert torch.equal(result, images)
    assert result.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Augmentation)])
def test_each_setting_acts_and_leaves_its_input_alone(images, field):
    before = images.clone()
    amount = True if field.endswith("flip") else 1.0
    augment = Augmentation(**{field: amount})
    result = augment(images, seeded())
    assert torch.equal(images, before)
    assert not torch.equal(result, images)
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(result, augment(images, seeded()))
    assert not torch.equal(result, augment(images, seeded(1)))


def test_a_generator_moves_on(images):
    generator = seeded()
    assert not torch.equal(EVERYTHING(images, generator), EVERYTHING(images, generator))


def test_the_global_generator_is_not_touched(images):
    before = torch.get_rng_state()
    EVERYTHING(images, seeded())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("field", "axis"), [("horizontal_flip", 2), ("vertical_flip", 1)])
def test_flips_are_exact_and_happen_half_of_the_time(field, axis):
    images = torch.rand((2000, 3, 4, 4), generator=seeded(99))
    result = Augmentation(**{field: True})(images, seeded())
    flipped = (result == images.flip(axis + 1)).flatten(1).all(dim=1)
    same = (result == images).flatten(1).all(dim=1)
    assert torch.equal(flipped, ~same)
    # Binomial(2000, 1/2): standard deviation 22.4; five of these on either side.
    assert abs(flipped.sum().item() - 1000) < 112


def test_both_flips_are_independent():
    images = torch.rand((4000, 3, 4, 4), generator=seeded(99))
    result = Augmentation(horizontal_flip=True, vertical_flip=True)(images, seeded())
    for candidate in (images, images.flip(3), images.flip(2), images.flip(2, 3)):
        n = (result == candidate).flatten(1).all(dim=1).sum().item()
        # Binomial(4000, 1/4): standard deviation 27.4.
        assert abs(n - 1000) < 137


def is_uniform(values, low, high):
    """Within [low, high] up to rounding, and by Kolmogorov and Smirnov at about 1e-6: D < 2.7 / sqrt(n)."""
    n = len(values)
    ordered = ((values - low) / (high - low)).sort().values
    steps = torch.arange(n + 1) / n
    distance = max((ordered - steps[:-1]).abs().max().item(), (ordered - steps[1:]).abs().max().item())
    return ordered.min() >= -1e-3 and ordered.max() <= 1 + 1e-3 and distance < 2.7 / math.sqrt(n)


def test_brightness_factors_are_uniform():
    images = torch.full((2000, 3, 2, 2), 0.5)
    result = Augmentation(brightness=0.3)(images, seeded())
    assert torch.allclose(result, result[:, :1, :1, :1].expand_as(result))
    assert is_uniform(result[:, 0, 0, 0] / 0.5, 0.7, 1.3)


def test_contrast_factors_are_uniform_and_keep_the_mean():
    images = torch.full((2000, 3, 2, 2), 0.5)
    images[:, :, 0] = 0.4
    images[:, :, 1] = 0.6
    result = Augmentation(contrast=0.3)(images, seeded())
    assert torch.allclose(result.mean(dim=(1, 2, 3)), torch.tensor(0.5), atol=1e-4)
    assert is_uniform((result[:, 0, 1, 0] - result[:, 0, 0, 0]) / 0.2, 0.7, 1.3)


def test_saturation_factors_are_uniform_and_leave_grey_alone():
    grey = torch.rand((4, 1, 8, 8), generator=seeded(99)).expand(4, 3, 8, 8)
    augment = Augmentation(saturation=0.3)
    # The weights of the channels sum to 0.9999.
    assert torch.allclose(augment(grey, seeded()), grey, atol=1e-4)
    colour = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1).expand(2000, 3, 2, 2)
    result = augment(colour, seeded())
    assert is_uniform((result[:, 2, 0, 0] - result[:, 0, 0, 0]) / 0.2, 0.7, 1.3)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_is_torchvisions_at_some_factor_per_image(images, name):
    result = Augmentation(**{name: 0.5})(images, seeded())
    adjust = getattr(reference, f"adjust_{name}")
    factors = set()
    for image, changed in zip(images, result, strict=True):
        errors = [(adjust(image, f / 500) - changed).abs().max().item() for f in range(250, 751)]
        best = min(errors)
        # Half a step of the search, 1/1000, times a difference of at most 1.
        assert best < 1.1e-3
        factors.add(errors.index(best))
    assert len(factors) > 8


def test_quarter_turns_are_exact_and_counter_clockwise(images):
    angles = torch.arange(16) * (math.pi / 2)
    result = _rotate(images, angles)
    for i, image in enumerate(images):
        # rot90 turns from the first axis towards the second: from rows to columns, counter-clockwise on
        # screen.
        assert torch.allclose(result[i], image.rot90(i % 4, (1, 2)), atol=1e-4)


def test_rotation_moves_a_blob_as_the_rotation_matrix_says():
    size = 65
    y, x = torch.meshgrid(torch.arange(size) - 32.0, torch.arange(size) - 32.0, indexing="ij")
    blob = torch.exp(-((x - 20) ** 2 + y**2) / 8).expand(300, 3, size, size)
    result = Augmentation(rotation=10)(blob, seeded())[:, 0]
    mass = result.sum(dim=(1, 2))
    centre_x, centre_y = (result * x).sum(dim=(1, 2)) / mass, (result * y).sum(dim=(1, 2)) / mass
    assert torch.allclose(torch.hypot(centre_x, centre_y), torch.tensor(20.0), atol=0.1)
    degrees = torch.atan2(-centre_y, centre_x).rad2deg()
    assert is_uniform(degrees, -10, 10)


def test_the_border_is_reflected_not_filled():
    bright = torch.full((8, 3, 33, 33), 0.8)
    assert torch.allclose(Augmentation(rotation=45)(bright, seeded()), bright, atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros((2, 3, 8, 8), dtype=torch.uint8),
        torch.zeros((3, 8, 8)),
        torch.zeros((2, 1, 8, 8)),
        torch.zeros((2, 3, 8, 9)),
    ],
)
def test_other_shapes_and_dtypes_are_refused(images):
    with pytest.raises(ValueError, match=r"\(B, 3, S, S\)"):
        EVERYTHING(images, seeded())


def test_an_empty_batch():
    assert EVERYTHING(torch.zeros((0, 3, 8, 8)), seeded()).shape == (0, 3, 8, 8)


def test_no_category_of_mvtec_gets_a_flip_that_breaks_its_logic():
    for name in (
        "breakfast_box",
        "juice_bottle",
        "splicing_connectors",
        "cable",
        "capsule",
        "metal_nut",
        "pill",
    ):
        augment = for_category(name)
        assert not augment.horizontal_flip, name
        assert not augment.vertical_flip, name
    for name in (
        "breakfast_box",
        "screw_bag",
        "pushpins",
        "splicing_connectors",
        "juice_bottle",
        "transistor",
    ):
        assert 0 < for_category(name).rotation <= 3


def test_an_unknown_category_is_neither_flipped_nor_turned():
    augment = for_category("my own part")
    assert not augment.horizontal_flip
    assert not augment.vertical_flip
    assert augment.rotation == 0
    assert 0 < max(augment.brightness, augment.contrast, augment.saturation) <= 0.1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", Augmentation()),
        (" NONE ", Augmentation()),
        ("hflip,vflip,rotate=3,brightness=0.1,contrast=0.1,saturation=0.1", EVERYTHING),
        (" VFlip , Rotate = 180 ", Augmentation(vertical_flip=True, rotation=180)),
        ("brightness=1e-3", Augmentation(brightness=0.001)),
        ("rotate=0", Augmentation()),
    ],
)
def test_parse(text, expected):
    assert Augmentation.parse(text) == expected


@pytest.mark.parametrize(
    "augment",
    [
        Augmentation(),
        EVERYTHING,
        Augmentation(rotation=1 / 3, contrast=1e-17, saturation=1),
        Augmentation(vertical_flip=True, rotation=10),
        for_category("screw_bag"),
        for_category("unknown"),
    ],
)
def test_to_text_is_the_inverse_of_parse(augment):
    assert Augmentation.parse(augment.to_text()) == augment


def test_to_text_is_short():
    assert EVERYTHING.to_text() == "hflip,vflip,rotate=3,brightness=0.1,contrast=0.1,saturation=0.1"
    assert Augmentation().to_text() == "none"


@pytest.mark.parametrize(
    ("text", "token", "accepted"),
    [
        ("", "''", "hflip"),
        ("hflip,", "''", "hflip"),
        ("flip", "'flip'", "vflip"),
        ("hflip,none", "'none'", "hflip"),
        ("hflip=1", "'hflip=1'", "hflip"),
        ("vflip,rotate", "'rotate'", "rotate=DEGREES"),
        ("rotate=", "'rotate='", "0 to 180"),
        ("rotate=three", "'rotate=three'", "0 to 180"),
        ("rotate=181", "'rotate=181'", "0 to 180"),
        ("rotate=nan", "'rotate=nan'", "0 to 180"),
        ("brightness=-0.1", "'brightness=-0.1'", "0 to 1"),
        ("contrast=inf", "'contrast=inf'", "0 to 1"),
        ("saturation=1.1", "'saturation=1.1'", "0 to 1"),
        ("hflip,rotate=3,hflip", "'hflip'", "twice"),
    ],
)
def test_parse_names_the_bad_token_and_what_is_accepted(text, token, accepted):
    with pytest.raises(UserError) as caught:
        Augmentation.parse(text)
    assert token in str(caught.value)
    assert accepted in str(caught.value)


@pytest.mark.parametrize(
    "amounts", [{"rotation": 181}, {"brightness": -0.1}, {"contrast": math.nan}, {"saturation": 2}]
)
def test_amounts_out_of_range(amounts):
    with pytest.raises(UserError, match="must be from 0 to"):
        Augmentation(**amounts)
