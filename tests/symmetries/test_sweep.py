"""Every claim about a model of transformers is exact, whatever model it is."""

import pytest

from tests.symmetries.sweep import judge, model_kinds

TOLERANCE = 1e-8
# A few of each sort; all of them in the long form.
SOME = [
    "arcee",
    "beit",
    "data2vec-text",
    "deit",
    "marian",
    "mt5",
    "qwen2_moe",
    "unispeech",
]


def require_exact(kind):
    verdict = judge(kind)
    if not verdict.problem:
        assert verdict.worst <= TOLERANCE, verdict
    return verdict


@pytest.mark.parametrize("kind", SOME)
def test_claims_of_copies_are_exact(kind):
    """Families without a line of their own: known as copies of others."""
    verdict = require_exact(kind)
    assert verdict.problem == ""
    assert verdict.pairs > 0


@pytest.mark.long
def test_claims_of_all_models_are_exact():
    verdicts = [require_exact(kind) for kind in model_kinds()]
    built = [verdict for verdict in verdicts if not verdict.problem]
    assert len(built) >= 250
    assert sum(verdict.pairs > 0 for verdict in built) >= 150
