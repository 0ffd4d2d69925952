"""What goes wrong on one process is refused on all, or taken by all."""

import re
from pathlib import Path

import pytest

from .faults import (
    added_group,
    broken_pair,
    example_of,
    found_before_sharding,
    missing_gradient,
    nan_on_one,
    no_gradients,
    older_state_of_experts,
    thawed,
)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", ["blocks.1.attention.value.weight", "blocks.2.mlp.up.weight"])
def test_nan_on_one_process_is_refused_by_all(two, name, first):
    for text, unchanged, goes_on in two.run(nan_on_one, name, first):
        assert name in text
        assert "nothing was updated" in text
        assert unchanged
        assert goes_on


def test_a_broken_pair_is_refused_by_all(two):
    for text, unchanged in two.run(broken_pair):
        assert "blocks.1.attention.qk" in text
        assert "not finite" in text
        assert unchanged


def test_a_gradient_that_one_process_lacks_is_zero_there(two):
    for alike, finite in two.run(missing_gradient, False):
        assert alike
        assert finite


def test_a_parameter_without_gradient_is_left_alone(two):
    for alike, finite in two.run(missing_gradient, True):
        assert not alike
        assert finite


def test_a_step_without_gradients_does_nothing(two):
    for unchanged, states in two.run(no_gradients):
        assert unchanged
        assert states == 0


def test_layers_that_are_trained_later(two):
    assert max(two.run(thawed)) < 1e-7


@pytest.mark.parametrize("experts", [False, True])
def test_symmetries_that_were_found_before_sharding(two, experts):
    """Three experts are split over two processes unevenly."""
    for deviation, message in two.run(found_before_sharding, experts):
        assert deviation < 1e-10
        assert "belong to another model" in message


def test_a_state_in_which_experts_were_adamws(two):
    assert max(two.run(older_state_of_experts)) < 1e-10


# The first gradient of a group makes both of its frames, and in frames of all heads some entries of
# it are near Adam's ε: they amplify rounding (to 1.3e-10 on one processor, 3e-12 on another).
@pytest.mark.parametrize(("row_frame", "bound"), [("per_head", 1e-10), ("per_matrix", 1e-9)])
@pytest.mark.parametrize("tensor_rate", [False, True])
def test_a_group_that_is_added_later(two, tensor_rate, row_frame, bound):
    assert max(two.run(added_group, tensor_rate, row_frame)) < bound


def test_the_example_of_the_document(two):
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    text = page.read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert two.run(example_of, example) == [(4, True), (4, True)]
