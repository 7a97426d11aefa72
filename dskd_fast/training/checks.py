"""What can go wrong in a training, found before it costs time or said in the user's words."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator

import torch

from dskd_fast.data.category import Category
from dskd_fast.data.contents import copies
from dskd_fast.device import is_out_of_memory, numerics
from dskd_fast.errors import UserError
from dskd_fast.files import checksum_of
from dskd_fast.models import DSKD
from dskd_fast.runs.history import Epoch
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.training.checkpoints import Checkpoints, Position
from dskd_fast.training.distributed import Group, connected

# An epoch whose loss is so many times the first one's has lost more than it had learned.
_EXPLODED = 10
# What cameras give in files of 16 bits. Read as 16, even the most of them are a quarter as bright as they could be.
_CAMERA_BITS = (10, 12, 14)
# Options that may differ among the machines of a training.
_OF_THE_MACHINE = ("device", "teacher_weights")


def notice_on_bits(peaks: Iterable[int | None], bits: int | None) -> str | None:
    """What to say where most images of 16 bits use few of them, or where no image needs `bits`.

    Args:
        peaks: the largest value of each image of 16 bits, None for the others.
        bits: see `TrainingOptions`.
    """
    deep = [peak for peak in peaks if peak is not None]
    if bits is not None:
        return None if deep else f"--bits {bits} changes nothing: no image has values of 16 bits"
    dark = [peak for peak in deep if peak < 2 ** max(_CAMERA_BITS)]
    if not dark or 2 * len(dark) < len(deep):
        return None
    needed = next(n for n in _CAMERA_BITS if max(dark) < 2**n)
    others = f", which then refuses the other {len(deep) - len(dark)}" if len(dark) < len(deep) else ""
    return (
        f"warning: {len(dark)} of the {len(deep)} images of more than 8 bits never exceed {2**needed - 1} of 65535, so "
        f"they are read as at most {round(max(dark) * 255 / 65535)} of 255: if the camera gives {needed} bits, train "
        f"with --bits {needed}{others}; if they are to be that dark, with --bits 16"
    )


def warning_on_copies(category: Category) -> str | None:
    """What to say where validation images are, by their contents, training images, too."""
    found = copies(category.validation, category.train)
    if not found:
        return None
    return (
        f"copies of training images among the {len(category.validation)} validation images: {len(found)}, such as "
        f"{found[0].name}; they score too low to set a threshold, so have each image once and train again"
    )


def is_sound(model: DSKD, images: torch.Tensor) -> bool:
    """Whether the students still give finite features, so that their state is worth keeping.

    The loss of the step just taken does not show it: it was computed before the weights changed.
    """
    model.eval()
    with torch.inference_mode(), numerics("fp32", images.device):
        features = model(images)
    model.train()
    students = (features.local_student, features.global_student)
    return all(bool(torch.isfinite(level).all()) for levels in students for level in levels or ())


def check_batches(model: DSKD, n: int, options: TrainingOptions, group: Group) -> None:
    """Raise UserError for a number of images that leaves a batch too small to be trained on."""
    last = n % options.batch_size or options.batch_size
    if last < group.size:
        raise UserError(
            f"{n} training images in batches of {options.batch_size} leave a last batch of {last} for {group.size} "
            "processes: use another --batch-size or fewer processes"
        )
    if options.image_size // (2 * model.teacher.levels[2].stride) == 1 and last == 1:
        raise UserError(
            f"{n} training images in batches of {options.batch_size} leave a batch of one, whose embedding at image "
            f"size {options.image_size} is a single value per channel, which batch norm cannot train on: use a larger "
            f"--image-size{' or another --batch-size' if n > 1 else ''}"
        )


def check_same_training(category: Category, options: TrainingOptions, checkpoints: Checkpoints, group: Group) -> None:
    """Check that all processes have the first one's images, options and state, as on machines with disks of their own.

    Raises:
        UserError: in the first process that has others.
        PeerFailed: in the others.
    """
    if group.size == 1:
        return
    # Nothing has been saved since it was read.
    path = None if checkpoints.found is None else checkpoints.path
    own_state = group.agree(lambda: None if path is None else checksum_of(path))
    images, of_first, state = group.of_first((category.fingerprint, options, own_state))

    def compare() -> None:
        if category.fingerprint != images:
            raise UserError(
                f"the images in {category.root} are not those of the training's first process (names and contents are "
                "compared): copy its images to this machine"
            )
        for name in (field.name for field in dataclasses.fields(options) if field.name not in _OF_THE_MACHINE):
            mine, others = getattr(options, name), getattr(of_first, name)
            if mine != others:
                raise UserError(
                    f"{name} is {mine!r} here, and {others!r} in the training's first process: start all processes "
                    "with the same options"
                )
        if own_state != state:
            raise UserError(
                f"{checkpoints.path} is not here what it is for the training's first process: have all machines see "
                "the same run folder, or copy it to this place on each of them"
            )

    group.agree(compare)


@contextlib.contextmanager
def clear_errors(options: TrainingOptions, group: Group) -> Iterator[None]:
    """Say in the user's words why a training step failed, where PyTorch says it in its own."""
    try:
        with contextlib.nullcontext() if group.size == 1 else connected():
            yield
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if is_out_of_memory(error):
            size = options.batch_size
            smaller = f"--batch-size {size // 2}" if size > 1 else "a smaller --image-size"
            message = f"the memory is too small for a training step with batches of {size}: try {smaller}"
        elif options.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            message = f"torch.compile cannot compile the training here ({reason}): leave --compile out"
        else:
            raise
        raise UserError(message) from None


def grown_loss(first: Epoch, last: Epoch) -> str | None:
    """What to say if the last epoch has lost more than the first one had learned."""
    for name in ("local_loss", "global_loss"):
        before, now = getattr(first, name), getattr(last, name)
        if before is not None and now > _EXPLODED * before:
            return f"the {name.replace('_', ' ')} has grown from {before:.3g} in the first epoch to {now:.3g}"
    return None


def diverged(what: str, at: Position, options: TrainingOptions, checkpoints: Checkpoints) -> UserError:
    """What to raise where a training no longer learns."""
    where = f"epoch {len(at.history) + 1}, step {math.ceil(at.seen / options.batch_size)}{checkpoints.last_saved()}"
    other = " or use --precision fp32" if options.precision != "fp32" else ""
    return UserError(f"{what} at {where}: lower --lr (now {options.lr:g}){other}")
