"""US, the uninformed students: regression error and disagreement of an ensemble that learns the teacher's descriptors.

Bergmann et al., "Uninformed Students" (CVPR 2020). Theirs: students that see patches regress a teacher's descriptors,
each channel normalised over the training images; error of the ensemble's mean and variance over the ensemble, each in
deviations over validation images, are added up. Ours: the teacher, see `Descriptors`; one patch size (37 pixels) in
place of 17, 33 and 65; smaller students with strides and batch normalisation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dskd_fast.paper.baselines.blocks import Normaliser, fit_normalisers, train_networks
from dskd_fast.paper.baselines.descriptors import Descriptors, Regression, fitted_to
from dskd_fast.paper.baselines.fitting import Fitting
from dskd_fast.paper.baselines.protocol import Baseline, Images

N_STUDENTS = 3


class UninformedStudents(Baseline):
    """An ensemble of students that regress descriptors."""

    relative_steps = 2

    def __init__(self, size: int, channels: Sequence[int]) -> None:
        super().__init__(size, channels)
        self.descriptors = Descriptors(self.channels[1])
        self.students = nn.ModuleList(Regression(self.channels[1]) for _ in range(N_STUDENTS))
        self.of_errors, self.of_variances = Normaliser(), Normaliser()

    def fit(self, images: Images, validation: Images, fitting: Fitting) -> None:
        self.descriptors.fit(images)
        train_networks(self, images, fitting, self._loss)
        fit_normalisers(validation, self._errors_and_variances, self.of_errors, self.of_variances)

    def maps(self, images: Images) -> Tensor:
        errors, variances = self._errors_and_variances(images).unbind(1)
        return self.at_size(self.of_errors(errors) + self.of_variances(variances))

    def _loss(self, images: Images) -> Tensor:
        wanted = self.descriptors(images)
        return (self._regressed(images, wanted) - wanted).square().mean((1, 2, 3, 4)).sum()

    def _regressed(self, images: Images, wanted: Tensor) -> Tensor:
        """(students, B, C, h, w)."""
        pixels = 2 * images.pixels - 1
        return torch.stack([fitted_to(student(pixels), wanted.shape[-2:]) for student in self.students])

    def _errors_and_variances(self, images: Images) -> Tensor:
        """(B, 2, h, w): of the ensemble's mean, and over the ensemble, summed over channels."""
        wanted = self.descriptors(images)
        found = self._regressed(images, wanted)
        mean = found.mean(0)
        variance = (found - mean).square().mean(0)
        return torch.stack([(mean - wanted).square().sum(1), variance.sum(1)], 1)
