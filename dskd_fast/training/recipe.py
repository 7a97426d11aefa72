"""What a recipe says of a training step, whoever runs the loop: losses, learning rate, averages of the weights."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dskd_fast.choices import LITE
from dskd_fast.losses import make_loss
from dskd_fast.models import DSKD, Features
from dskd_fast.runs.options import TrainingOptions

ADAM_BETAS = (0.5, 0.999)


def first_networks(options: TrainingOptions, *, pretrained: bool) -> DSKD:
    """The networks as a training begins with them, on the CPU; `pretrained` as of `TrainingOptions.networks`.

    The process's random numbers stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        if options.teacher == LITE:
            import timm  # only to train

            # Its random weights are drawn before the students', as they always were, so that a seed gives the same.
            timm.create_model("tf_efficientnet_lite0")
        return options.networks(pretrained=pretrained)


class StudentLosses:
    """The loss of each student there is, as the options say."""

    def __init__(self, options: TrainingOptions) -> None:
        self.local_loss_fn = make_loss(options.local_loss, options.temperature)
        self.global_loss_fn = make_loss(options.global_loss, options.temperature)

    def __call__(self, features: Features) -> list[Tensor]:
        """Scalars, in the order of `DSKD.students`."""
        students = (
            (self.local_loss_fn, features.local_student),
            (self.global_loss_fn, features.global_student),
        )
        return [loss_fn(student, features.teacher) for loss_fn, student in students if student is not None]


def learning_rate(options: TrainingOptions, done: float, step: float) -> float:
    """Of a step that is the share `step` of a training of which the share `done` is over."""
    scale = (1 + math.cos(math.pi * done)) / 2 if options.schedule == "cosine" else 1.0
    if done + step < options.warmup:
        scale *= (done + step) / options.warmup
    return options.lr * scale


class WeightAverages:
    """Moving averages of the students' weights, which are the result of a training where the recipe has them.

    Of batch norm the statistics are averaged along: they belong to the weights of many steps, too.

    Args:
        model: on its device, where it has to stay.
        decay: per step; 0 averages nothing.
    """

    def __init__(self, model: DSKD, decay: float) -> None:
        self.decay = decay
        self._averaged = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if decay and tensor.is_floating_point() and not name.startswith("teacher.")
        }
        self._averages = {name: tensor.clone() for name, tensor in self._averaged.items()}
        self._n_steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after a step into account."""
        if self._averages:
            # The first weights are random: the average forgets them sooner than it will forget later ones.
            decay = min(self.decay, (1 + self._n_steps) / (10 + self._n_steps))
            torch._foreach_lerp_([*self._averages.values()], [*self._averaged.values()], 1 - decay)
            self._n_steps += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the averages, if there are any."""
        for name, average in self._averages.items():
            self._averaged[name].copy_(average)

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on; empty if nothing is averaged."""
        if not self._averages:
            return {}
        of_all = {f"average.{name}": tensor for name, tensor in self._averages.items()}
        return of_all | {"averaged": torch.tensor(self._n_steps)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            RuntimeError: it is another model's.
        """
        averages = {key.removeprefix("average."): x for key, x in tensors.items() if key != "averaged"}
        if averages.keys() != self._averages.keys():
            raise RuntimeError("it has averages of other weights than this training")
        for name, average in averages.items():
            self._averages[name].copy_(average)
        if averages:
            self._n_steps = int(tensors["averaged"])
