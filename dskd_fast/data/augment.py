"""Augmentation of training batches: flips, small rotations and colour jitter.

The paper augments "as GCAD does", which draws flips, rotations of up to 3 degrees and changes of brightness,
contrast and saturation, each switched on or off per category; the settings themselves were not published.
Logical anomalies make the choice matter: a flip that turns a good image into a forbidden one teaches the
model to accept it. The settings here are this project's own and conservative.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dskd_fast.errors import UserError

_FLIPS = {"hflip": "horizontal_flip", "vflip": "vertical_flip"}
# Token, field, and the largest value it can have.
_AMOUNTS = {
    "rotate": ("rotation", 180.0),
    "brightness": ("brightness", 1.0),
    "contrast": ("contrast", 1.0),
    "saturation": ("saturation", 1.0),
}
_ACCEPTED = "'none' or a comma-separated list of hflip, vflip, rotate=DEGREES, brightness=A, contrast=A, saturation=A"


@dataclass(frozen=True)
class Augmentation:
    """What a batch is augmented by. Each image draws its own parameters; what is off or 0 draws none.

    Attributes:
        horizontal_flip: mirror left and right with probability 1/2.
        vertical_flip: mirror top and bottom with probability 1/2.
        rotation: rotate by an angle uniform in [-rotation, rotation] degrees about the centre, 0 to 180;
            bilinear, with the image reflected at its borders.
        brightness: multiply by a factor uniform in [1 - brightness, 1 + brightness]; 0 to 1.
        contrast: scale the distance from the image's mean grey by such a factor; 0 to 1.
        saturation: scale the distance from each pixel's grey by such a factor; 0 to 1.

    Raises:
        UserError: an amount is not a number in its range.
    """

    horizontal_flip: bool = False
    vertical_flip: bool = False
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self):
        for token, (name, largest) in _AMOUNTS.items():
            amount = getattr(self, name)
            if not 0 <= amount <= largest:
                raise UserError(f"the augmentation '{token}' must be from 0 to {largest:g}, not {amount}")

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augment a batch.

        Args:
            images: float, shape (B, 3, S, S), values in [0, 1], on any device.
            generator: source of every random number; it may live on another device than ``images``.

        Returns:
            A new tensor of the shape, dtype and device of ``images``, values in [0, 1].

        Raises:
            ValueError: ``images`` is not a float tensor of shape (B, 3, S, S).
        """
        shape = tuple(images.shape)
        if not images.is_floating_point() or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
            raise ValueError(f"images must be float of shape (B, 3, S, S), not {images.dtype} of shape {shape}")

        def draw(amount: float) -> torch.Tensor:
            unit = torch.rand(len(images), generator=generator, device=generator.device, dtype=torch.float64)
            return ((2 * unit - 1) * amount).to(images)

        result = images.clone()
        if self.horizontal_flip:
            result = torch.where(draw(1.0).view(-1, 1, 1, 1) < 0, result.flip(3), result)
        if self.vertical_flip:
            result = torch.where(draw(1.0).view(-1, 1, 1, 1) < 0, result.flip(2), result)
        if self.rotation and len(images):
            result = _rotate(result, draw(math.radians(self.rotation)))
        if self.brightness:
            result = _blend(result, torch.zeros_like(result[:, :1]), 1 + draw(self.brightness))
        if self.contrast:
            mean = _grey(result).mean(dim=(2, 3), keepdim=True)
            result = _blend(result, mean, 1 + draw(self.contrast))
        if self.saturation:
            result = _blend(result, _grey(result), 1 + draw(self.saturation))
        return result

    @classmethod
    def parse(cls, text: str) -> "Augmentation":
        """Read the command line's form: "none", or such as "hflip,rotate=3,brightness=0.1".

        Raises:
            UserError: names the token that is wrong and what is accepted.
        """
        if text.strip().lower() == "none":
            return cls()
        settings: dict[str, Any] = {}  # by field: a flip's is a bool, an amount's a float
        for token in text.split(","):
            name, equals, value = (part.strip().lower() for part in token.partition("="))
            if name in _FLIPS and not equals:
                field = _FLIPS[name]
                setting: bool | float = True
            elif name in _AMOUNTS and equals:
                field, largest = _AMOUNTS[name]
                try:
                    setting = float(value)
                except ValueError:
                    setting = math.nan
                if not 0 <= setting <= largest:
                    raise UserError(f"bad augmentation '{token.strip()}': {name} takes a number from 0 to {largest:g}")
            else:
                raise UserError(f"bad augmentation '{token.strip()}': accepted is {_ACCEPTED}")
            if field in settings:
                raise UserError(f"the augmentation '{name}' is given twice in '{text}'")
            settings[field] = setting
        return cls(**settings)

    def to_text(self) -> str:
        """The form that `parse` reads back into an equal object."""
        flips = [token for token, name in _FLIPS.items() if getattr(self, name)]
        amounts = {token: float(getattr(self, name)) for token, (name, _) in _AMOUNTS.items()}
        tokens = flips + [f"{token}={repr(x).removesuffix('.0')}" for token, x in amounts.items() if x]
        return ",".join(tokens) or "none"


def for_category(name: str, recipe: str) -> Augmentation:
    """The setting for a category of MVTec LOCO AD or MVTec AD, and a conservative one for every other name.

    Unknown categories get a slight jitter of the colours alone: whether a mirrored or turned object is still
    a good one, only their owner knows. With the recipe "fast" they get nothing: in so few steps even the jitter
    costs more than it gives.
    """
    return _CATEGORIES.get(name, Augmentation() if recipe == "fast" else _UNKNOWN)


def _rotate(images: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate each image by its angle in radians, counter-clockwise as seen on screen."""
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # The grid says where each output pixel comes from: the inverse rotation, in coordinates whose y points
    # down.
    matrices = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _grey(images: torch.Tensor) -> torch.Tensor:
    from torchvision.transforms.v2 import functional as tvf  # only training needs it

    return tvf.rgb_to_grayscale(images)


def _blend(images: torch.Tensor, other: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """``other + factor * (images - other)`` with one factor per image, clamped to [0, 1]."""
    return torch.lerp(other.expand_as(images), images, factors.view(-1, 1, 1, 1)).clamp(0, 1)


_UNKNOWN = Augmentation(brightness=0.05, contrast=0.05, saturation=0.05)
_POSED = Augmentation(rotation=3, brightness=0.1, contrast=0.1, saturation=0.1)
_COLOUR_CODED = Augmentation(rotation=3, brightness=0.1, contrast=0.1, saturation=0.05)
_MIRRORED = Augmentation(True, False, rotation=3, brightness=0.1, contrast=0.1, saturation=0.1)
_ANY_POSE = Augmentation(True, True, rotation=3, brightness=0.1, contrast=0.1, saturation=0.1)

_CATEGORIES = {
    # MVTec LOCO AD.
    # Which food lies on which side of the box is part of the rule.
    "breakfast_box": _POSED,
    # The parts lie loose in the bag; their number and lengths survive any flip.
    "screw_bag": _ANY_POSE,
    # One pin, in any direction, in each cell of a regular grid, which a flip maps onto itself.
    "pushpins": _ANY_POSE,
    # The clamps differ between their two ends, and the colour of the cable tells how many there must be.
    "splicing_connectors": _COLOUR_CODED,
    # Labels carry pictures and text, liquid settles at the bottom, and the juice's colour must match the
    # label.
    "juice_bottle": _COLOUR_CODED,
    # MVTec AD, objects.
    # Seen along its axis: round.
    "bottle": _ANY_POSE,
    # Three wires, each colour in its own place; swapped wires are an anomaly.
    "cable": _COLOUR_CODED,
    # Printed text.
    "capsule": _POSED,
    # Lies in any pose.
    "hazelnut": _ANY_POSE,
    # A nut turned over, which mirrors it, is one of the defects.
    "metal_nut": _POSED,
    # Printed text.
    "pill": _POSED,
    # The thread has a handedness.
    "screw": _POSED,
    # Fixed upright pose, and the head has a mirror axis.
    "toothbrush": _MIRRORED,
    # The pose in the holes of the board is the rule; a misplaced part is an anomaly.
    "transistor": _POSED,
    # The two rows of teeth interlock with an offset that a flip would swap.
    "zipper": _POSED,
    # MVTec AD, textures: no direction carries a meaning beyond the weave or grain, whose axes both flips
    # keep.
    "carpet": _ANY_POSE,
    "grid": _ANY_POSE,
    "leather": _ANY_POSE,
    "tile": _ANY_POSE,
    "wood": _ANY_POSE,
}
