"""DSKD: a frozen teacher and its two students (paper section 3)."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from dskd_fast import functional
from dskd_fast.choices import DEFAULT_TEACHER, STAGE4_INITS, STUDENTS
from dskd_fast.errors import UserError
from dskd_fast.models.bottleneck import GlobalBottleneck, LocalBottleneck
from dskd_fast.models.folding import fold
from dskd_fast.models.initialisation import initialise
from dskd_fast.models.student import Student
from dskd_fast.models.teacher import Teacher

Branch = Literal["local", "global"]
BRANCHES: tuple[Branch, ...] = ("local", "global")

# Training takes 16 bytes for each: beyond this a machine would rather kill the process than say why.
_MAX_CONDENSING_PARAMETERS = 1e9


def branches_of(students: str) -> tuple[Branch, ...]:
    """The branches that one of `STUDENTS` names."""
    return tuple(branch for branch in BRANCHES if students in ("both", branch))


class Features(NamedTuple):
    """Feature maps of one batch, three per network, finest first; None for a missing student.

    `condensed` (B, g) is what the global student knows of the whole image before it draws features; None without that
    student or its GCCB.
    """

    teacher: list[Tensor]
    local_student: list[Tensor] | None
    global_student: list[Tensor] | None
    condensed: Tensor | None = None


class Measurements(NamedTuple):
    """What images are scored by, of one batch, float32; None for what a missing student or block would give.

    Attributes:
        local_levels, global_levels: how far each student is from the teacher, three maps (B, h, w), finest first.
        condensed: (B, g), see `Features`.
        global_means, teacher_means: spatial means of the first level's features, (B, C) each.
        patches: (B, h, w, C), the teacher's second and third level side by side at the second's size, each the mean of
            3 x 3 positions, see `DSKD.measure`.
        local_errors: features of the local student less the teacher's, each at unit length, of the two finest levels,
            (B, C, h, w).
        arrangement: None as measured; what `dskd_fast.detection.scoring` makes of patches beside their distances.
    """

    local_levels: list[Tensor] | None
    global_levels: list[Tensor] | None
    condensed: Tensor | None
    global_means: Tensor | None
    teacher_means: Tensor
    patches: Tensor
    local_errors: list[Tensor] | None
    arrangement: list[Tensor] | None = None


class DSKD(nn.Module):
    """Teacher, OCBE_loc + S_loc, OCBE_glo with GCCB + S_glo.

    Attributes:
        students: ("local", "global"), or the one there is.
        is_folded: whether `fold` was called.

    Args:
        teacher: "wide_resnet50_2" (the paper's), "lite" (weights come with a package), or any timm backbone with three
            feature levels, each half the size of the one before.
        image_size: S of the square input; a multiple of twice the stride of the teacher's third level (32).
        gccb: g, the channels to which the global branch condenses the whole image. None: half of the embedding's (the
            paper's 1024 of 2048); 0: no GCCB; the embedding's own number: no 1x1 convolutions.
        stage4_init: start of the global branch's embedding, on which the paper is silent: "imagenet" takes the
            teacher's own stage 4 where it is a ResNet's (others start at random), "random" does not.
        students: "both", or "local" or "global" for one branch alone (the paper's ablations).
        pretrained: load the teacher's ImageNet weights. False leaves them random, for tests and for loading a state.
        teacher_weights: file to load them from, instead of a download.

    Raises:
        UserError: unknown teacher, weights that cannot be had, or a size or g that does not fit.

    Example:
        >>> import torch
        >>> model = DSKD("lite", image_size=64, pretrained=False)
        >>> local_map, global_map = model.anomaly_maps(torch.rand(2, 3, 64, 64))
        >>> local_map.shape
        torch.Size([2, 64, 64])
    """

    def __init__(
        self,
        teacher: str = DEFAULT_TEACHER,
        *,
        image_size: int = 256,
        gccb: int | None = None,
        stage4_init: str = "imagenet",
        students: str = "both",
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
        if stage4_init not in STAGE4_INITS:
            raise ValueError(f"stage4_init={stage4_init!r} is not known: use 'imagenet' or 'random'")
        if students not in STUDENTS:
            raise ValueError(f"students={students!r} is not known: use one of {', '.join(map(repr, STUDENTS))}")
        self.image_size = image_size
        self.students = branches_of(students)
        self.is_folded = False
        if "local" in self.students:
            self.local_bottleneck = LocalBottleneck(levels)
            self.local_student = Student(levels, self.teacher.rectified)
        if "global" in self.students:
            self.global_bottleneck = GlobalBottleneck(levels, image_size // stride, self.gccb)
            self.global_student = Student(levels, self.teacher.rectified)
        for branch in (self.local_branch, self.global_branch):
            for part in branch:
                initialise(part)
        if pretrained or teacher_weights is not None:
            state = self.teacher.load_weights(teacher_weights)
            if stage4_init == "imagenet" and "global" in self.students and self.teacher.is_bottleneck_resnet:
                self._load_stage4(state)

    @staticmethod
    def load(run: str | PathLike[str], device: str = "auto") -> Any:
        """The trained detector of a run folder, as `dskd_fast.load` gives it."""
        # The package's own, since nothing here may import from above; networks alone need no run folder.
        import dskd_fast

        return dskd_fast.load(run, device)

    @property
    def local_branch(self) -> tuple[nn.Module, ...]:
        """OCBE_loc and S_loc; empty if there is no local student."""
        return (self.local_bottleneck, self.local_student) if "local" in self.students else ()

    @property
    def global_branch(self) -> tuple[nn.Module, ...]:
        """OCBE_glo and S_glo; empty if there is no global student."""
        return (self.global_bottleneck, self.global_student) if "global" in self.students else ()

    def fold(self) -> None:
        """Put batch norm into the convolutions, in place, for networks that only score from now on.

        Their maps change by float32 rounding. They cannot be trained, nor saved as a run's: the state dict is another.
        """
        self.eval()
        for network in self.children():
            fold(network)
        self.is_folded = True

    def forward(self, images: Tensor, of_teacher: list[Tensor] | None = None) -> Features:
        """RGB images (B, 3, S, S), float in [0, 1] -> the three networks' features.

        `of_teacher` are the teacher's features of these images, where they are known.

        Of the images only the shape is checked, for training's sake: looking at values makes a GPU wait.

        Raises:
            ValueError: another shape.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images has shape {tuple(images.shape)}: pass (B, 3, {self.image_size}, {self.image_size})"
            )
        features = self.teacher(images) if of_teacher is None else of_teacher

        local_student = global_student = condensed = None
        if "local" in self.students:
            local_student = self.local_student(self.local_bottleneck(features))
        if "global" in self.students:
            embedding, condensed = self.global_bottleneck(features)
            global_student = self.global_student(embedding)
        return Features(features, local_student, global_student, condensed)

    @torch.no_grad()
    def anomaly_maps(
        self,
        images: Tensor,
        temperature: float = 1.0,
        *,
        local_map: str = "cosine",
        global_map: str = "contextual-affinity",
        align_corners: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Each branch's anomaly map before normalisation (paper eq. 8): levels upsampled bilinearly and added.

        The networks score in eval mode and are then in the mode they were in, each part of them.

        Args:
            images: (B, 3, S, S), RGB, from 0 to 1: the teacher normalises them itself. Any floating dtype, converted to
                the networks' own, float32 (bfloat16 has lost up to half a level of 8-bit pixels, float16 a sixteenth).
                Traced by torch.compile or torch.export, values are not checked.
            temperature: T of the contextual affinity, as in training.
            local_map, global_map: "cosine" (distance per position, eq. 1) or "contextual-affinity" (KL, eq. 6).
            align_corners: of the upsampling, on which the paper is silent.

        Returns:
            Local map and global map, each (B, S, S), float32; None for a missing student.

        Raises:
            TypeError: `images` is no tensor.
            ValueError: another shape, integers, or values outside 0 to 1.
        """
        _, local_levels, global_levels = self._level_maps(images, temperature, local_map, global_map)
        size = images.shape[-2:]
        return added(local_levels, size, align_corners), added(global_levels, size, align_corners)

    @torch.no_grad()
    def measure(
        self,
        images: Tensor,
        temperature: float = 1.0,
        *,
        local_map: str = "cosine",
        global_map: str = "contextual-affinity",
        counts_beyond: bool = False,
    ) -> Measurements:
        """Everything that images are scored by; arguments and errors as of `anomaly_maps`.

        Args:
            counts_beyond: whether the patches' means count zeros beyond the border, as PatchCore's published code does.
        """
        features, local_levels, global_levels = self._level_maps(images, temperature, local_map, global_map)
        return Measurements(
            local_levels,
            global_levels,
            None if features.condensed is None else features.condensed.float(),
            None if features.global_student is None else features.global_student[0].float().mean((2, 3)),
            features.teacher[0].float().mean((2, 3)),
            _patches(features.teacher, counts_beyond),
            None if features.local_student is None else _errors(features.local_student[:2], features.teacher[:2]),
        )

    def _level_maps(
        self, images: Tensor, temperature: float, local_map: str, global_map: str
    ) -> tuple[Features, list[Tensor] | None, list[Tensor] | None]:
        """The networks' features in eval mode, and each student's distance from the teacher, level by level."""
        _check_images(images)
        training = [part for part in self.modules() if part.training]
        try:
            for part in training:
                part.training = False
            features = self(images.to(self.teacher.mean.dtype))
        finally:
            for part in training:
                part.training = True

        def level_maps(student: list[Tensor] | None, kind: str) -> list[Tensor] | None:
            if student is None:
                return None
            pairs = zip(student, features.teacher, strict=True)
            if kind == "cosine":
                return [functional.cosine_distance(s, t) for s, t in pairs]
            return [functional.contextual_affinity(s, t, temperature) for s, t in pairs]

        return features, level_maps(features.local_student, local_map), level_maps(features.global_student, global_map)

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


def _patches(teacher: list[Tensor], counts_beyond: bool) -> Tensor:
    """As PatchCore makes them (arXiv 2106.08265)."""
    # Channels of a place side by side are averaged in a quarter of the time, and read in order afterwards.
    maps = [x.float().contiguous(memory_format=torch.channels_last) for x in teacher[1:]]
    second, third = (nnf.avg_pool2d(x, 3, 1, 1, count_include_pad=counts_beyond) for x in maps)
    third = nnf.interpolate(third, second.shape[2:], mode="bilinear")
    return torch.cat([second, third], 1).permute(0, 2, 3, 1)


def _errors(student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
    return [_at_unit_length(s.float()) - _at_unit_length(t.float()) for s, t in zip(student, teacher, strict=True)]


def _at_unit_length(features: Tensor) -> Tensor:
    # As `nnf.normalize`, whose norm over channels that lie apart takes four times as long.
    return features / features.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)


def enlarged(level_maps: Sequence[Tensor], size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Maps (B, h, w) of several levels, bilinearly at one size, (B, levels, H, W)."""
    upsampled = [
        nnf.interpolate(m[:, None], tuple(size), mode="bilinear", align_corners=align_corners) for m in level_maps
    ]
    return torch.cat(upsampled, dim=1)


def added(level_maps: Sequence[Tensor] | None, size: Sequence[int], align_corners: bool = False) -> Tensor | None:
    """The sum of a student's maps of several levels at one size, (B, H, W) (paper eq. 8); None for no student."""
    return None if level_maps is None else enlarged(level_maps, size, align_corners).sum(1)


def _check_images(images: Tensor) -> None:
    """Raise TypeError or ValueError for what is no RGB image from 0 to 1; shapes apart."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images is a {type(images).__name__}: pass a tensor (B, 3, S, S) with values from 0 to 1")
    if not images.is_floating_point():
        dtype = str(images.dtype).removeprefix("torch.")
        raise ValueError(f"images has dtype {dtype}: pass floating values from 0 to 1 (uint8 images divided by 255)")
    if torch.compiler.is_compiling() or images.is_meta or not images.numel():
        return
    low, high = torch.stack(images.aminmax()).tolist()
    if not (low >= 0 and high <= 1):  # NaN fails, too
        raise ValueError(
            f"images has values from {low:g} to {high:g}: pass values from 0 to 1 (8-bit ones divided by 255, and not "
            "normalised, which the teacher does)"
        )
