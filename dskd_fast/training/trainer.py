"""One training step: the students' losses and their optimiser."""

import functools
import warnings
from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

from dskd_fast.device import numerics
from dskd_fast.models import DSKD, Features
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.training.distributed import ALONE, Group, synchronise_batch_norm
from dskd_fast.training.recipe import ADAM_BETAS, StudentLosses, WeightAverages, learning_rate
from dskd_fast.training.teacher import FrozenTeacher


class Trainer:
    """The students' losses and their optimiser: what one training step is.

    Args:
        model: on its device.
        options: the recipe.
        group: the processes that train together.
    """

    def __init__(self, model: DSKD, options: TrainingOptions, group: Group = ALONE) -> None:
        self.model = model.train()
        self.options = options
        self.losses = StudentLosses(options)
        self._forward: Callable[[torch.Tensor, list[torch.Tensor]], Features] = model
        if group.size > 1:
            for part in (*model.local_branch, *model.global_branch):
                synchronise_batch_norm(part)
            with warnings.catch_warnings():
                # The name that torch before 2.13 has, too; later ones warn of it.
                warnings.simplefilter("ignore", FutureWarning)
                # Buffers are the same everywhere: all of them come from the synchronised statistics.
                self._forward = DistributedDataParallel(model, broadcast_buffers=False)
        if options.compile:
            self._forward = torch.compile(self._forward)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        # On a CPU the fused optimiser copies what does not lie in the order of its dimensions, as channels_last weights
        # do not: a fifth of a step. To Adam all numbers are alike, so it gets views that lie in order.
        self._views = [_in_order(p.detach()) for p in self._parameters]
        self.optimizer = torch.optim.Adam(self._views, lr=options.lr, betas=ADAM_BETAS, fused=True)
        self.averages = WeightAverages(model, options.averaging)

    @functools.cached_property
    def teacher(self) -> FrozenTeacher:
        """What gives the features that the students learn; made late, since `load_state` brings weights."""
        return FrozenTeacher(self.model.teacher, self.options)

    def set_progress(self, done: float, step: float) -> None:
        """Set the learning rate of a step that is the share `step` of a training of which the share `done` is over."""
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate(self.options, done, step)

    def step(
        self, batch: torch.Tensor, weight: float = 1.0, of_teacher: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Train on RGB images (B, 3, S, S), float in [0, 1].

        Args:
            batch: the images.
            weight: of the loss; that of a part of a batch is the part's share, times the number of parts, since
                gradients are averaged over the parts.
            of_teacher: the teacher's features of the images, where they are known.

        Returns:
            The loss of each student there is, float32, in the order of `model.students`.
        """
        # Both hold the last step's gradients; neither is to keep them alive through this one.
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        if of_teacher is None:
            of_teacher = self.teacher(batch)
        with numerics(self.options.precision, batch.device):
            losses = self.losses(self._forward(batch, of_teacher))
            loss = torch.stack(losses).sum() * weight
        loss.backward()
        for view, parameter in zip(self._views, self._parameters, strict=True):
            view.grad = None if parameter.grad is None else _in_order(parameter.grad)
        self.optimizer.step()
        self.averages.update()
        return torch.stack(losses).detach()

    def finish(self) -> None:
        """Give the model the averages of its weights, if there are any: they are the training's result."""
        self.averages.apply()

    def state(self) -> dict[str, torch.Tensor]:
        """All that a later training needs to go on: weights, statistics of batch norm, moments of Adam."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": tensor for name, tensor in moments.items()}
        return tensors | self.averages.state()

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            RuntimeError: it is another model's.
        """
        of_model: dict[str, torch.Tensor] = {}
        moments: dict[int, dict[str, torch.Tensor]] = {}
        averages: dict[str, torch.Tensor] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "model":
                of_model[name] = tensor
            elif kind in ("average", "averaged"):
                averages[key] = tensor
            else:
                index, name = name.split(".")
                moments.setdefault(int(index), {})[name] = tensor
        self.averages.load_state(averages)
        self.model.load_state_dict(of_model)
        self.__dict__.pop("teacher", None)  # made of the weights before
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


def _in_order(x: torch.Tensor) -> torch.Tensor:
    """A view of x that is contiguous, if x is so in either memory format."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 and not x.is_contiguous() else x
