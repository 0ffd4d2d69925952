"""What goes wrong on one process is refused on all, or taken by all."""

import pytest

from .faults import deficient_pair, missing_gradient, nan_on_one, no_gradients, thawed


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", ["blocks.1.attention.value.weight", "blocks.2.mlp.up.weight"])
def test_nan_on_one_process_is_refused_by_all(two, name, first):
    for text, unchanged, goes_on in two.run(nan_on_one, name, first):
        assert name in text
        assert "nothing was updated" in text
        assert unchanged
        assert goes_on


def test_a_deficient_pair_is_refused_by_all(two):
    for text, unchanged in two.run(deficient_pair):
        assert "blocks.1.attention.qk" in text
        assert "rank-deficient" in text
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
    assert max(two.run(thawed)) < 1e-8
