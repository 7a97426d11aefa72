import dataclasses
import math
import re
import shutil
import weakref
from itertools import chain

import numpy as np
import pytest
import torch

from dskd_fast.data.layout import open_category
from dskd_fast.data.store import ImageStore
from dskd_fast.errors import UserError
from dskd_fast.functional import contextual_affinity, cosine_distance
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.training import recipe as recipe_module
from dskd_fast.training.checks import notice_on_bits
from dskd_fast.training.train import train
from dskd_fast.training.trainer import Trainer


@pytest.fixture(scope="module")
def category(tmp_path_factory, write_images):
    """Eight images to train on and three for validation. Read only."""
    root = tmp_path_factory.mktemp("data") / "part"
    write_images(root / "train" / "good", 8)
    write_images(root / "validation" / "good", 3, seed=1)
    return open_category(root, None)


@pytest.fixture
def few(tmp_path, write_images):
    """Makes a category of n training images and nothing else."""

    def make(n):
        write_images(tmp_path / f"few {n}", n)
        return open_category(tmp_path / f"few {n}", None)

    return make


@pytest.fixture
def asked_for(monkeypatch):
    """The indices of each batch that was taken from the store, in order."""
    batches, original = [], ImageStore.batch

    def batch(self, indices):
        batches.append(list(indices))
        return original(self, batches[-1])

    monkeypatch.setattr(ImageStore, "batch", batch)
    return batches


def same_weights(one, other):
    a, b = one.model.state_dict(), other.model.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_seed_alone_gives_the_bits_and_no_test_image_does(category, tiny_options, tmp_path, write_images):
    options = tiny_options(augmentation="hflip,rotate=3,brightness=0.1")
    first, history = train(category, options)
    torch.rand(7)
    state = torch.random.get_rng_state()
    own = shutil.copytree(category.root, tmp_path / "part")
    write_images(own / "test" / "broken", 2)
    second, _ = train(open_category(own, None), options)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same_weights(first, second)
    assert first.calibration == second.calibration
    other, other_history = train(category, dataclasses.replace(options, seed=1))
    assert not same_weights(first, other)
    assert first.calibration != other.calibration
    assert [e.local_loss for e in history] != [e.local_loss for e in other_history]


def test_each_part_of_the_recipe_has_an_effect(few, tiny_options):
    category, options = few(2), tiny_options(batch_size=2)
    reference, _ = train(category, options)
    for different in ({"augmentation": "brightness=0.1"}, {"local_loss": "flattened-cosine"}, {"temperature": 0.2}):
        assert not same_weights(train(category, dataclasses.replace(options, **different))[0], reference), different


@pytest.mark.parametrize(
    ("peaks", "bits", "message"),
    [
        ([None, None], None, None),
        ([65535, 40000, None], None, None),
        ([4095, 3000, None], None, "2 of the 2 images of more than 8 bits never exceed 4095 of 65535, so they are"),
        ([4095], None, "at most 16 of 255: if the camera gives 12 bits, train with --bits 12; if"),
        ([4095, 4000, 65535], None, "2 of the 3 .* with --bits 12, which then refuses the other 1; if"),
        ([0], None, "with --bits 10;"),
        ([4095], 16, None),
        ([None], 12, "--bits 12 changes nothing: no image has values of 16 bits"),
    ],
)
def test_unused_bits_are_named_with_what_to_do(peaks, bits, message):
    found = notice_on_bits(peaks, bits)
    assert (found is None) if message is None else re.search(message, found)


def test_every_image_is_seen_once_per_epoch_in_a_new_order_and_none_of_validation(category, tiny_options, asked_for):
    train(category, tiny_options(epochs=3, batch_size=3))
    fitted, calibrated = asked_for[1:10], asked_for[10:]
    assert asked_for[0] == list(range(8))  # the teacher's features, kept for all epochs
    assert [len(batch) for batch in fitted] == [3, 3, 2] * 3
    epochs = [list(chain(*fitted[i : i + 3])) for i in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # What distances are measured from comes from the training images, what is normal, from the validation images.
    assert list(chain(*calibrated)) == [*range(8), 8, 9, 10]


def test_validation_images_that_are_trained_on_and_unused_bits_are_named(write_images, tiny_options, tmp_path, caplog):
    images = write_images(tmp_path / "part" / "train", 3)
    validation = write_images(tmp_path / "part" / "validation", 3, seed=1)
    shutil.copy(images[2], validation[1])
    detector, _ = train(open_category(tmp_path / "part", None), tiny_options(bits=12))
    assert notice_on_bits([], 12) in caplog.messages
    few, warning = detector.calibration.warnings
    assert few.startswith("only 3 validation images set the threshold: expect 25% of good images")
    assert "copies of training images among the 3 validation images: 1, such as 001.png" in warning
    assert f"warning: {warning}" in caplog.messages


def test_without_validation_images_some_are_held_out_or_none_set_a_threshold(few, tiny_options, asked_for):
    detector, _ = train(few(5), tiny_options())
    assert list(chain(*asked_for[2:])) == [*range(5)] * 2
    calibration = detector.calibration
    assert (calibration.source, calibration.n_images, calibration.threshold) == ("train", 5, None)
    asked_for.clear()
    detector, _ = train(few(10), tiny_options())
    assert sorted(chain(*asked_for[:2])) == list(range(8))
    assert detector.calibration.threshold.n_images == 2


def test_both_losses_fall_when_a_few_images_are_learned_by_heart(few, tiny_options):
    _, history = train(few(4), tiny_options(epochs=16))
    losses = np.array([(epoch.local_loss, epoch.global_loss) for epoch in history])
    assert losses.shape == (16, 2)
    assert (losses >= 0).all()
    assert (losses[-3:].mean(0) < 0.7 * losses[:3].mean(0)).all()
    assert all(epoch.images_per_second > 0 for epoch in history)


@pytest.mark.parametrize(("schedule", "warmup"), [("constant", 0.0), ("cosine", 0.0), ("cosine", 0.5)])
def test_the_learning_rate_is_constant_or_falls_with_each_step(category, tiny_options, monkeypatch, schedule, warmup):
    rates = []

    def step(self, *_):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return torch.zeros(2)

    monkeypatch.setattr(Trainer, "step", step)
    train(category, tiny_options(epochs=3, lr=0.004, schedule=schedule, warmup=warmup))
    factors = [(1 + math.cos(math.pi * step / 6)) / 2 if schedule == "cosine" else 1 for step in range(6)]
    factors = [factor * min(1, (step + 1) / 6 / warmup) if warmup else factor for step, factor in enumerate(factors)]
    assert rates == pytest.approx([0.004 * factor for factor in factors])


def test_the_result_is_the_moving_average_of_weights_and_batch_norm(tiny_options):
    options = tiny_options(averaging=0.5)
    model = options.networks(pretrained=True)
    trainer = Trainer(model, options)

    def state():
        return {name: x.clone().double() for name, x in model.state_dict().items() if x.is_floating_point()}

    average = state()
    for step in range(8):
        if step == 5:  # killed and gone on with
            saved = trainer.state()
            model = options.networks(pretrained=True)
            trainer = Trainer(model, options)
            trainer.load_state(saved)
        trainer.step(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(step)))
        decay = min(0.5, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * x for name, x in state().items()}
    trainer.finish()
    for name, x in state().items():
        torch.testing.assert_close(x, average[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.fixture
def losses(monkeypatch):
    """Replaces losses by known values that depend on the number of images alone: losses(cosine=float)."""
    original = recipe_module.make_loss

    def replace(**values):
        def make(name, t):
            if (value := values.get(name.replace("-", "_"))) is None:
                return original(name, t)
            return lambda student, teacher: sum(s.sum() for s in student) * 0 + value(len(student[0]))

        monkeypatch.setattr(recipe_module, "make_loss", make)

    return replace


def test_an_epochs_loss_is_the_mean_over_images_not_over_batches(few, tiny_options, losses):
    losses(cosine=float, contextual_affinity=lambda n: 10.0 * n)
    reports = []
    _, history = train(few(5), tiny_options(epochs=2), reports.append)
    # A batch of four and a batch of one.
    assert [epoch.local_loss for epoch in history] == pytest.approx([(4 * 4 + 1 * 1) / 5] * 2)
    assert [epoch.global_loss for epoch in history] == pytest.approx([10 * 17 / 5] * 2)
    assert [(r.step, r.steps, r.epoch) for r in reports] == [(1, 4, 1), (2, 4, 1), (3, 4, 2), (4, 4, 2)]
    assert [r.local_loss for r in reports] == pytest.approx([4, 3.4, 4, 3.4])


@pytest.mark.parametrize(
    ("loss", "values", "precision", "message"),
    [
        ("cosine", [1, 1, math.nan], "fp32", r"no longer finite .* at epoch 2, step 1: lower --lr \(now 0\.005\)$"),
        ("contextual_affinity", [1, 1, math.inf], "fp32", r"no longer finite .* at epoch 2, step 1: lower --lr"),
        ("cosine", [math.nan], "bf16", r"lower --lr .* or use --precision fp32"),
        ("contextual_affinity", [1.0, 1.0, 9.9, 9.9, 0.1, 0.1, 10.1, 10.1], "fp32",
         r"global loss has grown from 1 in the first epoch to 10\.1 at epoch 4, step 2: lower --lr"),
    ],
)  # fmt: skip
def test_a_loss_not_finite_or_grown_tenfold_ends_it(few, tiny_options, losses, loss, values, precision, message):
    steps = iter(values)
    losses(**{loss: lambda n: next(steps)})
    with pytest.raises(UserError, match=message):
        train(few(8), tiny_options(epochs=9, precision=precision))


@pytest.mark.parametrize(("students", "loss"), [("local", "contextual-affinity"), ("global", "flattened-cosine")])
def test_a_student_trains_alone_with_any_loss_and_is_the_whole_score(category, tiny_options, students, loss):
    detector, history = train(category, tiny_options(students=students, epochs=2, **{f"{students}_loss": loss}))
    absent = "global" if students == "local" else "local"
    assert [getattr(epoch, f"{absent}_loss") for epoch in history] == [None] * 2
    assert getattr(history[-1], f"{students}_loss") < getattr(history[0], f"{students}_loss")
    assert detector.variants == ("combined", students)
    assert not [name for name in detector.model.state_dict() if name.startswith(absent)]
    images = ImageStore(category.validation, 64).batch(range(3))
    maps = detector.maps(images)
    assert maps.of(absent) is None
    np.testing.assert_array_equal(maps.combined, maps.of(students))
    # The map is that of the loss.
    features = detector.model(images.float() / 255)
    function = contextual_affinity if loss == "contextual-affinity" else cosine_distance
    expected = 0
    for s, t in zip(getattr(features, f"{students}_student"), features.teacher, strict=True):
        expected += torch.nn.functional.interpolate(function(s, t)[:, None], (64, 64), mode="bilinear")[:, 0]
    torch.testing.assert_close(detector.raw_maps(images)[0], expected.detach())


def test_in_bf16_it_trains_to_nearly_the_same(category, tiny_options):
    options = tiny_options(precision="bf16")
    detector, (epoch,) = train(category, options)
    _, (in_fp32,) = train(category, tiny_options())
    assert epoch.local_loss == pytest.approx(in_fp32.local_loss, rel=0.05)
    assert epoch.local_loss != in_fp32.local_loss
    assert all(p.dtype == torch.float32 for p in detector.model.parameters())
    # The students learn the features of the teacher that scores, rounded once: none is off by more than 8 bits allow.
    batch = torch.rand(2, 3, 64, 64)
    learned = Trainer(detector.model, options).teacher(batch)
    for ours, scored in zip(learned, detector.model.teacher(batch), strict=True):
        torch.testing.assert_close(ours.float(), scored, rtol=2**-8, atol=1e-4)
    images = ImageStore(category.validation, 64).batch([0])
    assert all(m.dtype == torch.float32 for m in detector.raw_maps(images))


@pytest.mark.parametrize(
    ("n", "batch_size", "way_out"),
    [(5, 4, " or another --batch-size"), (1, 100, ""), (2, 1, " or another --batch-size"), (6, 4, None)],
)
def test_a_single_image_with_a_single_position_cannot_be_normalised(few, tiny_options, n, batch_size, way_out):
    # Batch norm would see one value per channel, and torch would fail with a message about that.
    options = tiny_options(image_size=32, batch_size=batch_size)
    if way_out is None:
        train(few(n), options)
        return
    with pytest.raises(UserError, match=f"use a larger --image-size{way_out}$"):
        train(few(n), options)
    if n == 1:
        assert train(few(1), tiny_options(batch_size=batch_size))[0].calibration.n_images == 1


def test_what_cannot_be_trained_is_a_user_error(category, tiny_options):
    with pytest.raises(UserError, match=r"image size 100 .*multiple of 32"):
        train(category, tiny_options(image_size=100))
    with pytest.raises(UserError, match="has no training images"):
        train(dataclasses.replace(category, train=()), tiny_options())


def test_values_out_of_range_are_named():
    out_of_range = {"teacher": (5, None), "teacher_weights": (1,), "image_size": (0, "64", 64.0), "gccb": ("8",)}
    out_of_range |= {"epochs": (0,), "batch_size": (0, -4), "lr": (0.0, math.nan, math.inf, "0.1"), "compile": (1,)}
    out_of_range |= {"schedule": ("linear",), "temperature": (0.0, 0.001, 1000.0), "augmentation": ("mirror", None)}
    out_of_range |= {"sigma": (0.0, -1.0, math.nan, 1e9), "seed": (-1, 2**63, 1.5), "bits": (8, 17)}
    for name, values in out_of_range.items():
        for value in values:
            with pytest.raises(UserError, match=f"{name}|{value}"):
                TrainingOptions(**{"teacher": "lite"} | {name: value})


@pytest.fixture
def trainer(tiny_options):
    options = tiny_options()
    return Trainer(options.networks(pretrained=True).to(memory_format=torch.channels_last), options)


def test_no_gradient_of_a_step_lives_through_the_next(trainer, monkeypatch):
    """They are as large as the weights."""
    batch, forward = torch.rand(4, 3, 64, 64), trainer.model.forward
    trainer.step(batch)
    kept = [weakref.ref(p.grad) for p in trainer.model.parameters() if p.grad is not None]
    assert kept

    def looked_at(*arguments):
        assert not [reference for reference in kept if reference() is not None]
        assert all(view.grad is None for group in trainer.optimizer.param_groups for view in group["params"])
        return forward(*arguments)

    monkeypatch.setattr(trainer.model, "forward", looked_at)
    trainer.step(batch)


def test_the_optimiser_sees_weights_in_order_and_changes_them_as_it_would_the_weights(trainer):
    """channels_last weights, each step against PyTorch's plain Adam on a copy."""
    assert all(view.is_contiguous() for group in trainer.optimizer.param_groups for view in group["params"])
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    copies = [p.detach().clone().requires_grad_() for p in trained]
    plain = torch.optim.Adam(copies, lr=TrainingOptions.lr, betas=(0.5, 0.999), foreach=False)
    for _ in range(2):
        trainer.step(torch.rand(4, 3, 64, 64).contiguous(memory_format=torch.channels_last))
        for copy, parameter in zip(copies, trained, strict=True):
            copy.grad = parameter.grad.clone()
        plain.step()
        for copy, parameter in zip(copies, trained, strict=True):
            torch.testing.assert_close(parameter, copy, rtol=1e-5, atol=1e-6)
