import itertools
import statistics
from pathlib import Path

import pytest

from sparse_backend.bench.trace import Trace, names
from sparse_backend.errors import UserError

GOOD = """
description: test
burstiness: 1.0
classes:
  one:
    share: 1
    density: 0.1
    prompt_tokens: {median: 10, spread: 0.5, most: 40}
    output_tokens: {median: 5, spread: 0, most: 5}
"""


def load(folder: Path, text: str) -> Trace:
    file = folder / "trace.yaml"
    file.write_text(text)
    return Trace.load(str(file))


@pytest.mark.parametrize("name", names())
def test_the_products_traces_hold_what_they_say(name: str) -> None:
    trace = Trace.load(name)
    requests = trace.requests(seed=0, rate=20, count=4000)
    assert requests[-1].at_s == pytest.approx(4000 / 20, rel=0.1)
    shares = sum(of_class.share for of_class in trace.classes.values())
    for class_name, of_class in trace.classes.items():
        lengths = [request.prompt_tokens for request in requests if request.traffic_class == class_name]
        assert len(lengths) / 4000 == pytest.approx(of_class.share / shares, abs=0.03)
        assert statistics.median(lengths) == pytest.approx(of_class.prompt_tokens.median, rel=0.1)
        assert max(lengths) <= of_class.prompt_tokens.most


def test_a_seed_is_the_same_requests_at_every_load() -> None:
    trace = Trace.load("mix")
    slow, fast = (trace.requests(seed=3, rate=rate, count=50) for rate in (1, 10))
    assert [(r.traffic_class, r.prompt_tokens, r.output_tokens) for r in slow] == [
        (r.traffic_class, r.prompt_tokens, r.output_tokens) for r in fast
    ]
    assert [r.at_s for r in slow] == pytest.approx([10 * r.at_s for r in fast])
    assert trace.requests(seed=3, rate=1, count=50) == slow
    assert trace.requests(seed=4, rate=1, count=50) != slow


def test_burstiness_is_the_variation_of_the_gaps(tmp_path: Path) -> None:
    for burstiness in (0.0, 0.5, 2.0):
        trace = load(tmp_path, GOOD.replace("burstiness: 1.0", f"burstiness: {burstiness}"))
        times = [request.at_s for request in trace.requests(seed=0, rate=1, count=5000)]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(burstiness, rel=0.1, abs=1e-9)


def test_lengths_shrink_with_the_context(tmp_path: Path) -> None:
    requests = load(tmp_path, GOOD).requests(seed=0, rate=1, count=500, scale=0.1)
    assert {request.output_tokens for request in requests} == {1}
    assert max(request.prompt_tokens for request in requests) <= 4
    assert min(request.prompt_tokens for request in requests) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "burstiness",
            "burstines",
            r"no field burstines \(did you mean burstiness\?\). Known are description, burstiness, classes",
        ),
        (
            "density",
            "sparsity",
            r"no field classes\.one\.sparsity.*Known are share, density, prompt_tokens, output_tokens",
        ),
        ("spread: 0.5", "sigma: 0.5", r"no field classes\.one\.prompt_tokens\.sigma.*Known are median, spread, most"),
        ("share: 1", "share: 0", r"classes\.one\.share: Input should be greater than 0"),
        ("share: 1", "share: [", "cannot be read"),
    ],
)
def test_what_a_trace_cannot_have_is_refused_with_what_it_can(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, GOOD.replace(old, new))


def test_unknown_traces_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'rush' is no trace\. Known are chat, .*mix, qa"):
        Trace.load("rush")
    with pytest.raises(UserError, match="cannot be read"):
        Trace.load(str(tmp_path / "none.yaml"))
