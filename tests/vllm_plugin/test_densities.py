import pytest

from sparse_backend.vllm_plugin.densities import Densities


def test_a_prompt_gives_the_first_estimate_and_decodes_move_it() -> None:
    densities = Densities(0.1)
    assert densities.running("a") is None
    densities.observe("a", [0.2, 0.4])
    assert densities.running("a") == pytest.approx(0.3)
    densities.observe("a", [0.0])
    assert densities.running("a") == pytest.approx(0.3 * 15 / 16)
    for _ in range(200):
        densities.observe("a", [0.05])
    assert densities.running("a") == pytest.approx(0.05, rel=0.01)


def test_the_end_tells_the_mean_over_all_rows() -> None:
    densities = Densities(0.1)
    densities.observe("a", [0.2, 0.4])
    densities.observe("a", [0.6])
    assert densities.finish("a", []) == (pytest.approx(0.4), 3)
    assert densities.running("a") is None
    assert densities.finish("a", []) is None
    densities.observe("a", [])
    assert densities.finish("a", []) is None


def test_a_new_request_is_guessed_from_the_most_telling_key_that_is_known() -> None:
    densities = Densities(0.1)
    assert densities.predict(["prefix", "session"]) == 0.1
    densities.observe("a", [0.5])
    densities.finish("a", ["session"])
    densities.observe("b", [0.3])
    densities.finish("b", ["prefix"])
    assert densities.predict(["prefix", "session"]) == pytest.approx(0.3)
    assert densities.predict(["other", "session"]) == pytest.approx(0.5)
    assert 0.1 < densities.predict(["other"]) < 0.12
    densities.observe("c", [0.1])
    densities.finish("c", ["session"])
    assert densities.predict(["session"]) == pytest.approx(0.3)


def test_what_is_remembered_is_bounded() -> None:
    densities = Densities(0.1)
    for index in range(20000):
        densities.observe("a", [0.5])
        densities.finish("a", [index])
    assert densities.predict([19999]) == 0.5
    assert len(densities._known) <= 8192
