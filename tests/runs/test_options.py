"""What a recipe makes of the number of images and of the options that are given besides."""

import math

import pytest

from dskd_fast.choices import RECIPES
from dskd_fast.runs.options import FAST_STEPS, RECIPE_OPTIONS, TrainingOptions, recipe_options


def test_the_papers_recipe_is_the_defaults():
    assert recipe_options("paper", 100, {}) == {}
    assert TrainingOptions(**recipe_options("paper", 100, {"seed": 3})) == TrainingOptions(seed=3)


@pytest.mark.parametrize("n_images", [1, 7, 8, 9, 351, 10_000])
@pytest.mark.parametrize("given", [{}, {"batch_size": 3}, {"batch_size": 1000}], ids=str)
def test_the_fast_recipe_is_as_many_epochs_as_its_steps_need(n_images, given):
    options = TrainingOptions(**recipe_options("fast", n_images, given))
    steps_per_epoch = math.ceil(n_images / options.batch_size)
    assert (options.epochs - 1) * steps_per_epoch < FAST_STEPS <= options.epochs * steps_per_epoch


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_given_besides_wins(recipe):
    given = {"epochs": 3, "batch_size": 5, "lr": 0.1, "schedule": "constant", "warmup": 0.5, "averaging": 0.0}
    given |= {"local_loss": "contextual-affinity", "temperature": 2.0}
    assert RECIPE_OPTIONS[recipe].keys() <= given.keys()
    assert recipe_options(recipe, 100, given) == given
