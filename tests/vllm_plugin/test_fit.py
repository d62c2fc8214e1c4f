import pytest

from sparse_backend.vllm_plugin.fit import Lateness

SHORT, LONG = 0.015, 0.045
TRIES = 32


def run(lateness: Lateness, predicted: float, factor: float = 1.0, count: int = TRIES) -> None:
    for _ in range(count):
        lateness.observe(predicted, factor * predicted)


@pytest.fixture
def lateness() -> Lateness:
    """Half of the short ones took twice as long as predicted."""
    lateness = Lateness()
    for _ in range(100):
        lateness.observe(SHORT, 2 * SHORT)
        lateness.observe(SHORT, SHORT)
        lateness.observe(LONG, LONG)
    assert lateness.most(SHORT) == pytest.approx(2 * SHORT)
    assert lateness.most(LONG) == LONG
    return lateness


def test_little_is_believed_of_few() -> None:
    lateness = Lateness()
    run(lateness, SHORT, 3, count=15)
    run(lateness, LONG, count=17)
    assert lateness.most(SHORT) == SHORT


def test_a_length_that_was_not_seen_is_taken_for_the_nearest_one(lateness) -> None:
    assert lateness.most(SHORT / 4) == pytest.approx(2 * SHORT / 4)
    assert lateness.most(LONG * 4) == LONG * 4


def test_nothing_is_less_late_than_predicted() -> None:
    lateness = Lateness()
    run(lateness, SHORT, 0.5, count=100)
    assert lateness.most(SHORT) == SHORT


def test_what_is_not_run_any_more_is_forgotten(lateness) -> None:
    run(lateness, LONG, count=50 * TRIES)
    assert lateness.most(SHORT) < 1.4 * SHORT
    run(lateness, LONG, count=150 * TRIES)
    assert lateness.most(SHORT) < 1.05 * SHORT
    # Nor does the first one in time bring it back.
    lateness.observe(SHORT, SHORT)
    run(lateness, LONG, count=TRIES)
    assert lateness.most(SHORT) < 1.05 * SHORT


def test_it_is_forgotten_sooner_where_nothing_of_the_kind_is_run(lateness) -> None:
    for _ in range(20 * TRIES):
        lateness.rest()
    assert lateness.most(SHORT) < 1.2 * SHORT


def test_it_is_forgotten_where_few_are_run(lateness) -> None:
    run(lateness, LONG, count=55 * TRIES)
    before = lateness.most(SHORT)
    for _ in range(4):
        lateness.observe(SHORT, SHORT)
        run(lateness, LONG, count=TRIES - 1)
    assert SHORT < lateness.most(SHORT) < before


def test_it_is_learned_anew(lateness) -> None:
    run(lateness, LONG, count=300 * TRIES)
    run(lateness, SHORT, 3, count=2 * TRIES)
    assert lateness.most(SHORT) == pytest.approx(3 * SHORT)
