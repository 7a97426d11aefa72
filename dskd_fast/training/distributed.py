"""Training in several processes that `torchrun` started."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from dskd_fast.errors import PeerFailed, UserError

T = TypeVar("T")

# A process that is stopped rather than dead answers no more, but closes no connection either.
_TIMEOUT = timedelta(minutes=10)
# For processes that meet after work of any length.
NEVER = timedelta(days=365)
_VANISHED = (
    "another process of this training does not answer any more, since it failed, was killed, or its machine cannot be "
    "reached: if it does not say why itself, start all of them again, with --resume and the run folder if that holds a "
    "checkpoint.safetensors"
)
_FAILED_ELSEWHERE = "another process of this training has ended, and says why on the machine where it ran"


@dataclass(frozen=True)
class Group:
    """The processes that train one model together; by default this one alone."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process's part of a batch of n: in order, and as large as the others' if that can be."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def add(self, values: Tensor) -> Tensor:
        """The sum over all processes, of a float64 tensor on the CPU."""
        if self.size == 1:
            return values
        # NCCL knows tensors on its GPU alone.
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        moved = values.to(device)
        with connected():
            distributed.all_reduce(moved)
        return moved.cpu()

    def exchange(self, rows: Tensor) -> None:
        """Complete a contiguous tensor (n, ...) on the CPU, of which each process has its `share(n)`, in place."""
        if self.size == 1:
            return
        with connected():
            for rank in range(self.size):
                # As bytes: not every backend knows bf16.
                distributed.broadcast(rows[Group(rank, self.size).share(len(rows))].view(torch.uint8), rank)

    def of_first(self, value: T) -> T:
        """The first process's value, which can be pickled, in all of them."""
        if self.size == 1:
            return value
        shared = [value]
        with connected():
            distributed.broadcast_object_list(shared)
        return shared[0]

    def agree(self, work: Callable[[], T]) -> T:
        """Do some work in every process, all of which go on only if it succeeds in all.

        Raises:
            UserError: the work's own, in the first process in which it failed.
            PeerFailed: in the others.
        """
        if self.size == 1:
            return work()
        failure: UserError | None = None
        try:
            result = work()
        except UserError as error:
            failure = error
        failed: list[Any] = [None] * self.size
        with connected():
            distributed.all_gather_object(failed, failure is not None)
        if not any(failed):
            return result
        if failure is not None and failed.index(True) == self.rank:
            raise failure
        raise PeerFailed


ALONE = Group()


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Turn a lost connection, which is an error of its backend's own kind, into PeerFailed."""
    try:
        yield
    except distributed.DistError as error:
        raise PeerFailed(_VANISHED) from error
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("gloo", "nccl", "connection", "peer", "socket", "store")):
            raise
        raise PeerFailed(_VANISHED) from error


def launched_as() -> tuple[int, int]:
    """This process's rank and the number of processes that `torchrun` started; (0, 1) without it."""
    if not distributed.is_torchelastic_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def why_peer_failed(error: PeerFailed) -> str:
    """What a process says that ended because of another one; nothing where that one, on this machine, says it."""
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    # One process of each machine is enough.
    is_said = is_one_machine or os.environ.get("LOCAL_RANK") != "0"
    return str(error) or ("" if is_said else _FAILED_ELSEWHERE)


def is_launched() -> bool:
    """Whether `torchrun` started this process as one of several."""
    return launched_as()[1] > 1


@contextlib.contextmanager
def group(device: torch.device, timeout: timedelta = _TIMEOUT) -> Iterator[Group]:
    """Join the processes that `torchrun` started: gloo on CPUs, NCCL on GPUs, one GPU for each process of a machine.

    Args:
        device: on which they work.
        timeout: after so long without an answer a process counts as dead.
    """
    if not is_launched():
        yield ALONE
        return
    use_gpu(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with connected():
        distributed.init_process_group(backend, timeout=timeout)
    try:
        yield Group(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def use_gpu(device: torch.device) -> None:
    """Make "cuda" mean the GPU of this process among those that `torchrun` started on this machine."""
    if device.type == "cuda" and is_launched():
        local_rank, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise UserError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, but there are {n_gpus} GPUs: use "
                f"--nproc-per-node {n_gpus}"
            )
        torch.cuda.set_device(local_rank)


def synchronise_batch_norm(model: nn.Module) -> None:
    """Have batch norm take its statistics over the batches of all processes: as one process with the whole batch."""
    if any(p.is_cuda for p in model.parameters()):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        # PyTorch's own works on GPUs alone. The state dict stays the same.
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SyncedBatchNorm2d


class _SyncedBatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values, dims = x.to(self.weight.dtype), (0, 2, 3)
        n = values.new_full((1,), values.numel() / values.shape[1])
        sums = _AllReduce.apply(torch.cat([values.sum(dims), n]))
        mean, count = sums[:-1] / sums[-1], sums[-1]
        centred = values - mean.view(1, -1, 1, 1)
        variance = _AllReduce.apply(centred.square().sum(dims)) / count
        # The networks' batch norm keeps moving averages, of which PyTorch's types are not sure.
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.view(1, -1, 1, 1), centred, scale.view(1, -1, 1, 1)).to(x.dtype)


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; so is its gradient, since each process's loss depends on it."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _AllReduce.forward(None, gradient.contiguous())
