"""The learning-rate schedule and the times of evaluation."""

import itertools

import pytest

from quotientopt.compare.protocol import Protocol


def test_schedule_warms_up_then_falls_to_a_tenth():
    protocol = Protocol(steps=600)
    values = [protocol.schedule(step) for step in range(600)]
    assert protocol.warmup == 50
    assert values[0] == pytest.approx(1 / 50)
    assert values[49] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert all(a < b for a, b in itertools.pairwise(values[:50]))
    assert all(a > b for a, b in itertools.pairwise(values[49:]))
    middle = 50 + 550 // 2 - 1
    assert values[middle] == pytest.approx(0.55)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (9, 1), (200, 20), (500, 50), (5000, 50)])
def test_warmup_of_short_runs_is_a_tenth(steps, warmup):
    protocol = Protocol(steps=steps)
    assert protocol.warmup == warmup
    assert all(0 < protocol.schedule(step) <= 1 for step in range(steps))


def test_evaluations_come_every_25_steps_and_at_the_end():
    protocol = Protocol(steps=60)
    assert [s + 1 for s in range(60) if protocol.evaluates_after(s)] == [25, 50, 60]
