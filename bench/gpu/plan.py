"""What is done on a GPU, in the order of its worth, and the small sizes with which it is rehearsed on a CPU.

Imports nothing: the driver has to work where PyTorch does not.
"""

from typing import NamedTuple


class Step(NamedTuple):
    """One step: `processes` processes of its own that end when its time is over.

    Attributes:
        name: of the function that it calls, in the module that `bench.gpu.steps` names.
        title: in the table.
        seconds: its share of the time, relative to those of the steps after it; what one leaves goes to the next ones.
        processes: how many share the work.
        beside: whether it runs beside the step before it, and has that step's time.
    """

    name: str
    title: str
    seconds: float
    processes: int = 1
    beside: bool = False


# Begins first, and may take until the end.
BUILD = Step("build", "C++ and CUDA C++ libraries", 0, processes=2)
STEPS = (
    Step("device", "Versions and device", 45),
    Step("correct", "Errors against float64", 100, processes=8),
    Step("warm", "Compiling ahead for the next steps", 100, processes=4, beside=True),
    Step("times", "Times of the losses", 100),
    Step("keys", "Distillation against any keys: errors", 45, processes=8),
    Step("key_times", "Distillation against any keys: times", 50),
    Step("model", "The whole model", 65),
    Step("train", "Training on the demo's images", 40, processes=3),
    Step("blocks", "Block sizes of level 1", 35),
    Step("tests", "pytest -m gpu", 50, processes=12),
)


class Plan(NamedTuple):
    """Sizes of a run.

    Attributes:
        device: on which all runs.
        backends: of this library; the last is built at first use.
        shapes: (B, C, H, W) of the paper's three levels.
        odd_shapes: others, that fill no block.
        key_sizes: (B, N, K, C) of the distillation's errors, that fill no block.
        batches: for the times.
        square: side of the matrix product that times are related to.
        seconds, warm_up, rounds: for about so long a time is measured, after so many calls, in at least and at most so
            many rounds.
        model: teacher, image size and batch of the whole model.
        train: images, image size and epochs.
        tests: arguments of pytest.
        every: of the cases of errors each one, or each second one and so on.
    """

    device: str
    backends: tuple[str, ...]
    shapes: tuple[tuple[int, int, int, int], ...]
    odd_shapes: tuple[tuple[int, int, int, int], ...]
    key_sizes: tuple[tuple[int, int, int, int], ...]
    batches: tuple[int, ...]
    square: int
    seconds: float
    model: tuple[str, int, int]
    train: tuple[int, int, int]
    tests: tuple[str, ...]
    warm_up: int = 3
    rounds: tuple[int, int] = (30, 200)
    every: int = 1
    is_rehearsal: bool = False


REAL = Plan(
    device="cuda",
    backends=("triton", "torch", "cuda"),
    shapes=((2, 256, 64, 64), (2, 512, 32, 32), (2, 1024, 16, 16)),
    odd_shapes=((2, 24, 1, 7), (1, 65, 9, 7), (2, 130, 13, 5), (1, 300, 17, 15), (3, 48, 23, 29)),
    key_sizes=((2, 131, 4099, 130), (3, 65, 257, 48), (1, 300, 20011, 257), (2, 17, 63, 600)),
    batches=(2, 16),
    square=8192,
    seconds=0.2,
    model=("wide_resnet50_2", 256, 16),
    train=(96, 128, 6),
    tests=(
        *("-m", "gpu", "--continue-on-collection-errors"),
        *("tests/backends/test_backends.py", "tests/backends/test_triton.py", "tests/ops"),
        *("tests/backends/test_distillation.py", "tests/backends/test_triton_distillation.py"),
        "tests/bench/test_triton_tune.py",
    ),
)
REHEARSAL = Plan(
    device="cpu",
    backends=("triton", "torch", "cpu"),
    shapes=((1, 40, 6, 6),),
    odd_shapes=((2, 24, 1, 7), (1, 20, 5, 3)),
    key_sizes=((2, 19, 70, 40),),
    batches=(1,),
    square=128,
    seconds=0.01,
    model=("test_resnet", 64, 4),
    train=(8, 64, 2),
    tests=("-k", "all_vectors_zero or on_a_gpu", "tests/backends/test_backends.py", "tests/bench/test_triton_tune.py"),
    warm_up=1,
    rounds=(2, 2),
    every=4,
    is_rehearsal=True,
)
