"""The blocks of dskd_fast/losses/README.md on training do what is said of them."""

import copy
import functools

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from .conftest import blocks, dense

BLOCKS = blocks("In your training")
SEGMENTATION = "Semantic segmentation, student and teacher of different widths"
AMP, DDP = "Gradient accumulation and mixed precision", "DistributedDataParallel"
COMPILE, VIT = "torch.compile and a temperature schedule", "Vision transformers with class and register tokens"


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def networks(dtype=torch.float32):
    """A student, a teacher that could be trained, and an optimizer."""
    student, teacher = (nn.Conv2d(3, 8, 3, stride=2, dtype=dtype) for _ in range(2))
    return {"student": student, "teacher": teacher, "optimizer": torch.optim.SGD(student.parameters(), lr=0.1)}


def run(block, **given):
    exec(BLOCKS[block], given)
    return given


def step_on_the_whole(given, images):
    """What the student has after one step on all images, by the dense form."""
    student = copy.deepcopy(given["student"])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    dense(student(images), given["teacher"](images).detach(), 0.5).backward()
    optimizer.step()
    return student.weight.detach()


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 48, 3, stride=2), nn.Conv2d(48, 5, 1)

    def forward(self, images):
        features = self.body(images)
        return features, nn.functional.interpolate(self.head(features), images.shape[2:])


def test_an_adapter_learns_with_the_student():
    student, teacher = Segmenter(), nn.Conv2d(3, 256, 3, stride=2)
    images, labels = torch.randn(2, 3, 15, 11), torch.randint(5, (2, 15, 11))
    before = copy.deepcopy(student)
    torch.manual_seed(1)
    found = run(SEGMENTATION, student=student, teacher=teacher, batches=[(images, labels)])
    torch.manual_seed(1)
    adapter = nn.Conv2d(48, 256, 1)
    features, logits = before(images)
    expected = nn.functional.cross_entropy(logits, labels) + dense(adapter(features), teacher(images), 0.5)
    torch.testing.assert_close(found["loss"].double(), expected.double(), rtol=1e-5, atol=0)
    expected.backward()
    for now, then in ((found["adapter"], adapter), (student.body, before.body)):
        torch.testing.assert_close(now.weight, (then.weight - 0.01 * then.weight.grad), rtol=1e-4, atol=1e-7)


def test_lightning_trains_the_student_alone(tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="lightning is not installed: see CONTRIBUTING.md")
    monkeypatch.chdir(tmp_path)
    given = networks()
    images = torch.randn(2, 3, 9, 9)
    expected, before = step_on_the_whole(given, images), given["student"].weight.detach().clone()
    fixed = given["teacher"].weight.clone()
    trainer = run("Lightning", **given, batches=torch.utils.data.DataLoader(images))["trainer"]
    assert trainer.global_step == 1
    difference = (given["student"].weight - expected).norm() / (expected - before).norm()
    assert difference < 0.02  # bf16 in the networks
    assert torch.equal(given["teacher"].weight, fixed)


def test_accumulated_parts_are_the_batch():
    given = networks()
    images, before = torch.randn(4, 3, 9, 9), given["student"].weight.detach().clone()
    expected = step_on_the_whole(given, images)
    found = run(AMP, **given, batches=images.split(1))
    assert found["loss"].dtype == torch.float32
    difference = (given["student"].weight - expected).norm() / (expected - before).norm()
    assert difference < 0.02  # bf16 in the networks


def test_processes_average_what_each_has_compared(in_two, tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    given = networks(torch.float64)
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected = step_on_the_whole(given, images)

    def work():
        run(DDP, **given, batches=images.split(1))
        torch.testing.assert_close(given["student"].weight.detach(), expected)

    codes, texts = in_two(work)
    assert codes == [0, 0], texts


def test_a_schedule_is_compiled_once(monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    given = networks()
    before = []
    given["student"].register_forward_pre_hook(lambda module, _: before.append(copy.deepcopy(module)))
    images = torch.randn(2, 3, 9, 9)
    found = run(COMPILE, **given, batches=[images] * 4)
    assert counter.frame_count == 1
    expected = dense(before[-1](images), given["teacher"](images), 0.8**3)
    torch.testing.assert_close(found["loss"].double(), expected, rtol=1e-5, atol=0)


def test_class_and_register_tokens_are_neither_rows_nor_keys():
    small = {"img_size": 24, "patch_size": 8, "depth": 1, "num_heads": 2}
    student = timm.models.VisionTransformer(**small, embed_dim=16)
    teacher = timm.models.VisionTransformer(**small, embed_dim=24, reg_tokens=4).eval()
    images = torch.randn(2, 3, 24, 24)
    found = run(VIT, vit_student=student, vit_teacher=teacher, images=images)
    tokens = [found["adapter"](student.forward_features(images)), teacher.forward_features(images)]
    expected = dense(tokens[0][:, 1:], tokens[1][:, 5:], 0.2)
    torch.testing.assert_close(found["loss"].double(), expected, rtol=2e-5, atol=0)
    assert found["adapter"].weight.grad.norm() > 0


def test_every_block_is_run():
    assert {*BLOCKS} == {SEGMENTATION, "Lightning", AMP, DDP, COMPILE, VIT}
