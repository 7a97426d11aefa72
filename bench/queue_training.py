"""`python -m bench.queue_training FOLDER`: a tiny student learns the lite teacher's pooled features over a queue.

FOLDER is laid out like MVTec LOCO, its images showing two rows of three cells with an object each, a cookie on black or
a figure on white. A step takes 32 random patches of cells, enqueues the teacher's vectors and distils them with the
loss of SEED. The measure is what cells of the validation images show, by the nearest neighbour among 12 training cells
in the student's vectors. All patches are grey, of a fifth of a cell's side and of the same mean and contrast, so
that neither background nor colour nor brightness gives them away. Then the loss is timed with the dense form in its
place, and the memory of both measured.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from bench import memory
from bench.distillation import CONTESTANTS, Work, call_of
from dskd_fast import AffinityDistillationLoss
from dskd_fast.data.images import read_image
from dskd_fast.functional import prepare_keys, update_keys
from dskd_fast.models.teacher import Teacher

_ROWS, _COLUMNS, _PATCH, _SIZE = 2, 3, 26, 64
_QUEUE, _BATCH, _KNOWN = 65_536, 32, 12
_MEASURED = (0, 2, 5, 10, 20, 50, 100, 200)
_STUDENT_TEMPERATURE, _TEACHER_TEMPERATURE = 0.2, 0.04


def cells(folder: Path) -> tuple[Tensor, Tensor]:
    """Grey cells (M, 1, S, S) of all images in a folder, in [0, 1], and whether each shows a figure, by its corners."""
    found = []
    for path in sorted(folder.iterdir()):
        image = torch.from_numpy(read_image(path)).float().mean(-1) / 255
        height, width = image.shape[0] // _ROWS, image.shape[1] // _COLUMNS
        side = min(height, width)
        for cell in image.unfold(0, side, height).unfold(1, side, width).flatten(0, 1):
            found.append(cell)
    stacked = torch.stack(found).unsqueeze(1)
    border = stacked[:, 0, 10:16, 10:16].flatten(1)
    return stacked, border.mean(1) > 0.5


def patches(cells: Tensor, generator: torch.Generator | None) -> Tensor:
    """A patch of each, in its middle or at a random place near, as RGB (M, 3, S, S) of the networks' size."""
    middle, reach = (cells.shape[-1] - _PATCH) // 2, 0 if generator is None else 12
    places = middle + torch.randint(-reach, reach + 1, (len(cells), 2), generator=generator)
    cut = torch.stack([x[:, i : i + _PATCH, j : j + _PATCH] for x, (i, j) in zip(cells, places.tolist(), strict=True)])
    if generator is not None:
        cut = torch.where(torch.rand((len(cut), 1, 1, 1), generator=generator) < 0.5, cut.flip(-1), cut)
        cut = torch.where(torch.rand((len(cut), 1, 1, 1), generator=generator) < 0.5, cut.mT, cut)
    mean, deviation = cut.mean((1, 2, 3), keepdim=True), cut.std((1, 2, 3), keepdim=True)
    cut = 0.5 + 0.2 * (cut - mean) / deviation
    return nnf.interpolate(cut, (_SIZE, _SIZE), mode="bilinear").expand(-1, 3, -1, -1).clamp(0, 1)


def make_student(channels: int) -> nn.Module:
    def block(n_in: int, n_out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()
        )

    return nn.Sequential(
        block(3, 16), block(16, 32), block(32, 64), block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, channels),
    )  # fmt: skip


def accuracy(network, known: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor]) -> float:
    """Share of the asked cells whose kind their nearest neighbour among the known ones has."""
    with torch.no_grad():
        x, y = (nnf.normalize(network(patches(z, None)), dim=1) for z, _ in (known, asked))
    return (known[1][(y @ x.T).argmax(1)] == asked[1]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.queue_training", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    train, validation = (cells(arguments.folder / split / "good") for split in ("train", "validation"))
    teacher = Teacher("lite")
    teacher.load_weights()
    pooled = lambda x: teacher(x)[-1].mean((2, 3))  # noqa: E731
    channels = teacher.levels[-1].channels
    student = make_student(channels)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=1e-4)
    loss_fn = AffinityDistillationLoss(_STUDENT_TEMPERATURE, _TEACHER_TEMPERATURE)
    memory_of_teacher = torch.zeros(_QUEUE, channels)
    queue = prepare_keys(memory_of_teacher)
    filled = torch.zeros(_QUEUE, dtype=torch.bool)
    some = torch.randperm(len(train[0]), generator=generator)[:_KNOWN]
    known = train[0][some], train[1][some]

    def measure(step: int, losses: list[float]) -> None:
        student.eval()
        told = accuracy(student, known, validation)
        student.train()
        mean = f"{statistics.mean(losses[-20:]):.4f}" if losses else "-"
        print(f"step {step:4d}   loss {mean}   nearest neighbours right {told:.3f}", flush=True)

    told = accuracy(pooled, known, validation)
    print(f"{len(validation[1])} cells asked, {len(known[1])} known; the teacher has {told:.3f} right")
    losses: list[float] = []
    seconds: dict[str, list[float]] = {"loss": [], "step": []}
    for step in range(arguments.steps):
        if step in _MEASURED:
            measure(step, losses)
        started = time.perf_counter()
        images = patches(train[0][torch.randint(len(train[0]), (_BATCH,), generator=generator)], generator)
        with torch.no_grad():
            target = pooled(images)
        start = step * _BATCH % _QUEUE
        update_keys(queue, target, start)
        filled[start : start + _BATCH] = True
        embedding = student(images)
        before = time.perf_counter()
        loss = loss_fn(embedding, target, queue, key_mask=filled)
        seconds["loss"].append(time.perf_counter() - before)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds["step"].append(time.perf_counter() - started)
        losses.append(loss.item())
    measure(arguments.steps, losses)
    print(", ".join(f"{statistics.median(values) * 1e3:.1f} ms a {name}" for name, values in seconds.items()))
    work = Work("queue", 1, _BATCH, _QUEUE, channels, _STUDENT_TEMPERATURE, _TEACHER_TEMPERATURE)
    for index, contestant in enumerate(CONTESTANTS):
        if contestant[:2] in (("eager", "fp32"), ("cpu, keys prepared", "fp32"), ("cpu, keys prepared", "bf16")):
            call = call_of(work, "forward+backward", index, torch.device("cpu"))
            call()
            times = []
            for _ in range(7):
                started = time.perf_counter()
                call()
                times.append(time.perf_counter() - started)
            extra, _ = memory.extra_bytes(call_of, (work, "forward+backward", index), torch.device("cpu"))
            milliseconds = statistics.median(times) * 1e3
            print(f"{contestant.name}, {contestant.precision}: {milliseconds:.1f} ms, {extra / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
