"""The slope of an error curve: fitted where it means something."""

import math

import pytest
import torch

from quotientopt.checks import fit_slope
from quotientopt.checks.verdict import rounding_noise, step_sizes

STEPS = step_sizes(2**-52)


def noise(seed=0):
    return torch.randn(len(STEPS), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_a_power_is_found_between_noise_and_higher_orders(power):
    errors = STEPS**power * (1 + 5 * STEPS - 3 * STEPS**2) + 1e-16 * noise().abs()
    fit = fit_slope(STEPS, errors, floor=1e-15)
    assert fit is not None
    assert abs(fit.slope - power) < 0.02
    assert fit.spread < 0.1
    assert fit.window[1] < 1.01 * 10 * fit.window[0]


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-6])
def test_a_small_wrong_term_shows_although_the_longer_piece_is_right(size):
    errors = STEPS**2 + size * STEPS
    fit = fit_slope(STEPS, errors, floor=1e-14)
    assert fit.slope < 1.1
    # Control: the straightest window anywhere is one of slope 2.
    larger = 1e3 * size < STEPS
    if larger.sum() > 9:
        assert abs(fit_slope(STEPS[larger], errors[larger]).slope - 2) < 0.01


def test_single_outliers_do_not_count():
    errors = STEPS**2
    errors[30] *= 2
    fit = fit_slope(STEPS[24:33], errors[24:33])
    assert abs(fit.slope - 2) < 0.02
    design = torch.stack((STEPS[24:33].log(), torch.ones(9).double()), dim=-1)
    least_squares = torch.linalg.lstsq(design, errors[24:33].log().unsqueeze(-1)).solution[0]
    assert abs(least_squares.item() - 2) > 0.05


def test_points_that_are_rounding_or_not_finite_are_left_out():
    errors = STEPS**3
    errors[STEPS < 1e-4] = 1e-12
    errors[-3:] = math.nan
    fit = fit_slope(STEPS, errors, floor=1e-12)
    assert abs(fit.slope - 3) < 1e-6
    assert 1e-4 < fit.window[0] < 1.5e-4
    # Control: without the floor the flat piece is the first straight one.
    assert abs(fit_slope(STEPS, errors).slope) < 1e-6


def test_too_few_points_give_nothing():
    assert fit_slope(STEPS, STEPS**2, floor=0.5) is None
    assert fit_slope(STEPS, 0 * STEPS) is None
    assert fit_slope(STEPS, math.nan * STEPS) is None


def test_half_a_decade_will_do():
    assert abs(fit_slope(STEPS, STEPS**2, floor=0.2**2).slope - 2) < 1e-6


def test_a_crooked_curve_is_told_by_its_spread():
    errors = STEPS**2 * (3 * noise()).exp()
    assert fit_slope(STEPS, errors).spread > 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_noise_sees_noise_and_not_the_function(dtype):
    eps = torch.finfo(dtype).eps

    def steep(step):
        return (torch.tensor(1.0, dtype=dtype) + 50 * torch.tensor(step, dtype=dtype).sin()).item()

    assert eps / 2 < rounding_noise(steep, eps) < 20 * eps
    # Control: first differences would take the slope of the function for noise.
    assert abs(steep(eps**0.6) - steep(0.0)) > 100 * eps
    assert rounding_noise(lambda step: 1.0 + 1e-6 * math.sin(1e9 * step), eps) > 1e-8
