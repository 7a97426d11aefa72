"""DSKD: a frozen teacher and its two students (paper section 3)."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from dskd_fast import functional
from dskd_fast.errors import UserError
from dskd_fast.models.blocks import initialise
from dskd_fast.models.bottleneck import GlobalBottleneck, LocalBottleneck
from dskd_fast.models.student import Student
from dskd_fast.models.teacher import DEFAULT, Teacher

# Training takes 16 bytes for each: beyond this a machine would rather kill the process than say why.
_MAX_CONDENSING_PARAMETERS = 1e9


class Features(NamedTuple):
    """Feature maps of one batch, three per network, finest first."""

    teacher: list[Tensor]
    local_student: list[Tensor]
    global_student: list[Tensor]


class DSKD(nn.Module):
    """Teacher, OCBE_loc + S_loc, OCBE_glo with GCCB + S_glo.

    Args:
        teacher: "wide_resnet50_2" (the paper's), "lite" (weights come with a package), or any timm backbone with three
            feature levels, each half the size of the one before.
        image_size: S of the square input; a multiple of twice the stride of the teacher's third level (32).
        gccb: g, the channels to which the global branch condenses the whole image. None: half of the embedding's (the
            paper's 1024 of 2048); 0: no GCCB; the embedding's own number: no 1x1 convolutions.
        stage4_init: start of the global branch's embedding, on which the paper is silent: "imagenet" takes the
            teacher's own stage 4 where it is a ResNet's (others start at random), "random" does not.
        pretrained: load the teacher's ImageNet weights. False leaves them random, for tests and for loading a state.
        teacher_weights: file to load them from, instead of a download.

    Raises:
        UserError: unknown teacher, weights that cannot be had, or a size or g that does not fit.
    """

    def __init__(
        self,
        teacher: str = DEFAULT,
        *,
        image_size: int = 256,
        gccb: int | None = None,
        stage4_init: str = "imagenet",
        pretrained: bool = True,
        teacher_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.teacher = Teacher(teacher)
        levels = self.teacher.levels
        if self.teacher.fixed_size not in (None, image_size):
            raise UserError(
                f"image size {image_size} does not fit the teacher {teacher}, which takes one size only: use "
                f"{self.teacher.fixed_size}"
            )
        stride = 2 * levels[2].stride
        if image_size <= 0 or image_size % stride:
            nearest = max(stride, round(image_size / stride) * stride)
            raise UserError(
                f"image size {image_size} does not fit the teacher {teacher}: use a multiple of {stride}, such as "
                f"{nearest}"
            )
        embedding = 2 * levels[2].channels
        self.gccb = embedding // 2 if gccb is None else gccb
        if not 0 <= self.gccb <= embedding:
            raise UserError(
                f"gccb={gccb} does not fit the teacher {teacher}: use 0 (no condensing block) to {embedding}"
            )
        condensing = 2 * self.gccb**2 * (image_size // stride) ** 2
        if condensing > _MAX_CONDENSING_PARAMETERS:
            raise UserError(
                f"at image size {image_size} and gccb={self.gccb} the condensing block would have {condensing:.1e} "
                f"parameters, more than {_MAX_CONDENSING_PARAMETERS:.0e}: lower the image size or gccb"
            )
        if stage4_init not in ("imagenet", "random"):
            raise ValueError(f"stage4_init={stage4_init!r} is not known: use 'imagenet' or 'random'")
        self.image_size = image_size
        self.local_bottleneck = LocalBottleneck(levels)
        self.local_student = Student(levels, self.teacher.rectified)
        self.global_bottleneck = GlobalBottleneck(levels, image_size // stride, self.gccb)
        self.global_student = Student(levels, self.teacher.rectified)
        for branch in (self.local_branch, self.global_branch):
            for part in branch:
                initialise(part)
        if pretrained or teacher_weights is not None:
            state = self.teacher.load_weights(teacher_weights)
            if stage4_init == "imagenet" and self.teacher.is_bottleneck_resnet:
                self._load_stage4(state)

    @property
    def local_branch(self) -> tuple[LocalBottleneck, Student]:
        return self.local_bottleneck, self.local_student

    @property
    def global_branch(self) -> tuple[GlobalBottleneck, Student]:
        return self.global_bottleneck, self.global_student

    def forward(self, images: Tensor) -> Features:
        """RGB images (B, 3, S, S), float in [0, 1] -> the three networks' features."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images has shape {tuple(images.shape)}: pass (B, 3, {self.image_size}, {self.image_size})"
            )
        features = self.teacher(images)
        return Features(
            features,
            self.local_student(self.local_bottleneck(features)),
            self.global_student(self.global_bottleneck(features)),
        )

    @torch.no_grad()
    def anomaly_maps(
        self, images: Tensor, temperature: float = 1.0, *, align_corners: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Each branch's anomaly map before normalisation (paper eq. 8): levels upsampled bilinearly and added.

        Args:
            images: (B, 3, S, S), RGB, float in [0, 1].
            temperature: T of the contextual affinity, as in training.
            align_corners: of the upsampling, on which the paper is silent.

        Returns:
            Local map (cosine distance, eq. 1) and global map (contextual affinity, eq. 6), each (B, S, S), float32.
        """
        features = self(images)
        size = images.shape[-2:]

        def add_levels(level_maps: list[Tensor]) -> Tensor:
            upsampled = [
                nnf.interpolate(m[:, None], size, mode="bilinear", align_corners=align_corners) for m in level_maps
            ]
            return torch.cat(upsampled, dim=1).sum(1)

        pairs = list(zip(features.local_student, features.teacher, strict=True))
        local_maps = [functional.cosine_distance(s, t) for s, t in pairs]
        pairs = list(zip(features.global_student, features.teacher, strict=True))
        global_maps = [functional.contextual_affinity(s, t, temperature) for s, t in pairs]
        return add_levels(local_maps), add_levels(global_maps)

    def _load_stage4(self, state: dict[str, Tensor]) -> None:
        prefix = "layer4."
        stage4 = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if not stage4:
            raise UserError(
                f"the weights hold no stage 4 of the teacher {self.teacher.name}: pass complete ImageNet weights, or "
                "start the global branch at random with --stage4-init random"
            )
        ours = self.global_bottleneck.embed.state_dict()
        # A ResNet's relatives (grouped, squeeze-and-excitation, deeper stems) have a stage 4 of another kind.
        if {k: v.shape for k, v in stage4.items()} == {k: v.shape for k, v in ours.items()}:
            self.global_bottleneck.embed.load_state_dict(stage4)
