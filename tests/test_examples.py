"""The examples in docstrings do what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    ("module", "n_examples"),
    [
        ("functional", 4),
        ("losses.distillation", 2),
        ("losses.affinity", 1),
        ("models.dskd", 1),
        ("detection.detector", 1),
        ("paper.baselines.neighbours", 1),
    ],
)
def test_the_examples_of(module, n_examples):
    found = [
        test for test in doctest.DocTestFinder().find(importlib.import_module(f"dskd_fast.{module}")) if test.examples
    ]
    assert len(found) >= n_examples
    for test in found:
        assert doctest.DocTestRunner().run(test).failed == 0, test.name
