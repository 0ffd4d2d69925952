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


# No class is known here: what inputs show, and nothing where there is nothing.
WITHOUT_CLAIMS = {
    "afmoe": 0,
    "apertus": 2,
    "beam": 0,
    "convbert": 4,
    "diffllama": 2,
    "muse_spark_text": 2,
}
SLOW = "muse_spark_text"


def require_exact(kind, *, examined=False):
    verdict = judge(kind, examined=examined)
    if not verdict.problem:
        assert verdict.worst <= TOLERANCE, verdict
        assert verdict.found_worst <= TOLERANCE, verdict
    return verdict


@pytest.mark.parametrize("kind", SOME)
def test_claims_of_copies_are_exact(kind):
    """Families without a line of their own: known as copies of others, and found without."""
    verdict = require_exact(kind, examined=True)
    assert verdict.problem == verdict.not_examined == ""
    assert verdict.pairs > 0
    assert verdict.found > 0
    assert verdict.missed == verdict.smaller == 0


@pytest.mark.parametrize(
    "kind",
    [
        *(kind for kind in WITHOUT_CLAIMS if kind != SLOW),
        pytest.param(SLOW, marks=pytest.mark.long),
    ],
)
def test_models_without_claims_show_their_pairs_to_inputs(kind):
    verdict = require_exact(kind, examined=True)
    assert verdict.problem == verdict.not_examined == ""
    assert verdict.pairs == 0
    assert verdict.found == WITHOUT_CLAIMS[kind]


@pytest.mark.long
def test_claims_of_all_models_are_exact():
    verdicts = [require_exact(kind, examined=True) for kind in model_kinds()]
    built = [verdict for verdict in verdicts if not verdict.problem]
    assert len(built) >= 250
    assert sum(verdict.pairs > 0 for verdict in built) >= 150
    examined = [verdict for verdict in built if not verdict.not_examined]
    assert len(examined) >= 240
    assert sum(not verdict.missed for verdict in examined) >= 0.95 * len(examined)
