"""The search for a learning rate, on made-up objectives, and the grids of the command line."""

import math

import pytest

from quotientopt.compare.optimizers import OPTIMIZERS
from quotientopt.compare.protocol import Trial, UsageError
from quotientopt.compare.tuning import parse_grid, plan, search_rates


def drive(search, objective):
    tried = []
    pending = next(search)
    while True:
        tried += pending
        try:
            pending = search.send([objective(rate) for rate in pending])
        except StopIteration as stop:
            return stop.value, tried


def valley(optimum):
    return lambda rate: math.log(rate / optimum) ** 2


def test_interior_optimum_needs_no_extension():
    found, tried = drive(search_rates([1.0, 2.0, 4.0], extend=True), valley(2.0))
    assert (found.rate, found.interior, tried) == (2.0, True, [1.0, 2.0, 4.0])


@pytest.mark.parametrize(("optimum", "last"), [(16.0, 32.0), (0.25, 0.125)])
def test_search_extends_until_the_optimum_is_interior(optimum, last):
    found, tried = drive(search_rates([1.0, 2.0, 4.0], extend=True), valley(optimum))
    assert (found.rate, found.interior) == (optimum, True)
    assert tried[-1] == last


def test_search_gives_up_after_four_extensions():
    found, tried = drive(search_rates([1.0, 2.0, 4.0], extend=True), valley(1e9))
    assert (found.rate, found.interior, len(tried)) == (64.0, False, 7)


def test_divergence_extends_downwards():
    found, tried = drive(
        search_rates([1.0, 2.0, 4.0], extend=True),
        lambda rate: math.inf if rate > 0.5 else valley(0.5)(rate),
    )
    assert (found.rate, found.interior) == (0.5, True)
    assert tried == [1.0, 2.0, 4.0, 0.5, 0.25]


def test_two_starting_rates_extend_to_either_side():
    assert drive(search_rates([1.0, 2.0], extend=True), valley(1.0))[1] == [1.0, 2.0, 0.5]
    assert drive(search_rates([1.0, 2.0], extend=True), valley(2.0))[1] == [1.0, 2.0, 4.0]


def test_explicit_grid_is_kept():
    found, tried = drive(search_rates([4.0, 1.0, 1.0], extend=False), valley(4.0))
    assert (found.rate, found.interior, tried) == (4.0, False, [1.0, 4.0])


def run_plan(name, rates, seeds, objective, make_run, finished=()):
    finished, asked = list(finished), []
    generator = plan(OPTIMIZERS[name], "gpt", rates, seeds, finished)
    pending = next(generator)
    while True:
        asked.append(pending)
        runs = [
            make_run(t.optimizer, t.rate, (9.0, objective(t)), t.seed, **t.settings)
            for t in pending
        ]
        finished += runs
        try:
            pending = generator.send(runs)
        except StopIteration:
            return asked


def test_plan_tunes_adamw_for_each_beta_then_repeats_the_best(make_run):
    def objective(trial):
        return valley(8e-3)(trial.rate) + abs(trial.settings["beta2"] - 0.98)

    asked = run_plan("adamw", None, 3, objective, make_run)
    assert [t.rate for t in asked[0]] == [2e-3, 4e-3, 8e-3]
    assert [t.rate for t in asked[1]] == [16e-3]
    assert asked[2] == [Trial("adamw", rate, {"beta2": 0.98}) for rate in (8e-3, 16e-3)]
    assert asked[3] == [Trial("adamw", 4e-3, {"beta2": 0.98})]
    assert asked[4] == [Trial("adamw", rate, {"beta2": 0.99}) for rate in (8e-3, 16e-3)]
    assert asked[5] == [Trial("adamw", 4e-3, {"beta2": 0.99})]
    decays = [{"beta2": 0.98, "weight_decay": decay} for decay in (0.03, 0.3)]
    assert asked[6] == [Trial("adamw", 8e-3, settings) for settings in decays]
    assert asked[7:] == [[Trial("adamw", 8e-3, {"beta2": 0.98}, seed) for seed in (1, 2)]]


def test_a_new_best_setting_takes_the_seeds_of_the_one_before(make_run):
    """A rate tried later, by a command that names no number of seeds, was chosen on seed 0."""
    settings = {"adamw_rate": 8e-3}
    before = [make_run("muon", 1e-2, (9.0, 2.0), seed, **settings) for seed in range(3)]

    def objective(trial):
        return 1.0 if trial.settings == settings else 3.0

    asked = run_plan("muon", [3e-2], 1, objective, make_run, before)
    assert asked[-1] == [Trial("muon", 3e-2, settings, seed) for seed in (1, 2)]


def test_what_diverged_everywhere_gets_no_further_seeds(make_run):
    finished = []
    generator = plan(OPTIMIZERS["quotient-adam-no-polar"], "gpt", [1e-2], 3, finished)
    (trial,) = next(generator)
    finished.append(make_run(trial.optimizer, trial.rate, (), **trial.settings))
    with pytest.raises(StopIteration):
        generator.send(finished[:])


def test_a_better_weight_decay_has_its_own_rates(make_run):
    def objective(trial):
        decay = trial.settings.get("weight_decay", 0.1)
        return valley(1.1e-2 if decay == 0.3 else 8e-3)(trial.rate) - 3 * decay

    asked = run_plan("soap", None, 2, objective, make_run)
    settings = {"weight_decay": 0.3}
    assert [t.rate for t in asked[0]] == [6e-3, 1.2e-2, 2.4e-2]
    assert asked[1] == [Trial("soap", 3e-3)]
    assert asked[2] == [Trial("soap", 6e-3, {"weight_decay": d}) for d in (0.03, 0.3)]
    assert asked[3] == [Trial("soap", rate, settings) for rate in (3e-3, 6e-3, 1.2e-2)]
    assert asked[4] == [Trial("soap", 2.4e-2, settings)]
    assert asked[5:] == [[Trial("soap", 1.2e-2, settings, 1)]]


def test_settings_are_tuned_again_at_a_better_weight_decay(make_run):
    """The best betas at 0.1 are not those at 0.3, where all is better."""

    def objective(trial):
        decay = trial.settings.get("weight_decay", 0.1)
        best = 0.98 if decay == 0.3 else 0.95
        return valley(8e-3)(trial.rate) + abs(trial.settings["beta2"] - best) - 3 * decay

    asked = run_plan("adamw", None, 2, objective, make_run)
    again = [{"beta2": beta2, "weight_decay": 0.3} for beta2 in (0.98, 0.99)]
    assert asked[-3] == [Trial("adamw", 8e-3, settings) for settings in again]
    assert asked[-2] == [Trial("adamw", rate, again[0]) for rate in (4e-3, 8e-3, 1.6e-2)]
    assert asked[-1] == [Trial("adamw", 8e-3, again[0], 1)]


def test_plan_with_an_explicit_grid_tries_just_that(make_run):
    asked = run_plan("soap", (1e-3, 2e-3), 1, lambda trial: trial.rate, make_run)
    assert asked == [[Trial("soap", 1e-3), Trial("soap", 2e-3)]]


def test_grids():
    names = ["adamw", "soap"]
    assert parse_grid("auto", names) == {}
    assert parse_grid("2e-3, 1e-3", names) == dict.fromkeys(names, (1e-3, 2e-3))
    assert parse_grid("adamw=1e-3:2e-3", names) == {"adamw": (1e-3, 2e-3)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "1e-3,",
        "0",
        "-1e-3",
        "nan",
        "inf",
        "muon=1e-3",
        "adamw=1e-3,2e-3",
        "adamw=",
        "adamw=1e-3,adamw=2e-3",
    ],
)
def test_bad_grids_are_refused(text):
    with pytest.raises(UsageError, match="bad --lr-grid"):
        parse_grid(text, ["adamw", "soap"])
