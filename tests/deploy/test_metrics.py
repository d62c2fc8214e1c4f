"""What dashboards and rules name is what the code exports, and the other way round. Needs no Prometheus."""

import asyncio

import pytest

from deploy.metrics import exported, reference
from deploy.metrics.queries import dashboard_expressions, metrics, rule_expressions, selectors

# Prometheus's own.
BUILT_IN = {"up", "ALERTS"}

EXPRESSIONS = [*dashboard_expressions(), *rule_expressions()]
RECORDED = {rule.place for rule in rule_expressions() if rule.kind == "record"}

# Labels that Prometheus adds, and those of histograms.
TARGET_LABELS = {"job", "instance", "le"}


@pytest.fixture(scope="module")
def ours():
    return asyncio.run(exported.ours())


@pytest.fixture(scope="module")
def vllms():
    return exported.vllms()


@pytest.fixture(scope="module")
def known(ours, vllms):
    """{series: its labels} of all that the code exports."""
    return {name: set(exported.labels(family)) for family in (*ours, *vllms) for name in exported.series(family)}


def test_every_metric_that_is_named_is_exported_or_recorded(known):
    named = {name: expression.place for expression in EXPRESSIONS for name in metrics(expression.text)}
    assert {name: place for name, place in named.items() if name not in known.keys() | RECORDED | BUILT_IN} == {}, (
        "no code exports them"
    )


def test_every_label_that_is_matched_is_one_the_metric_has(known):
    unknown = [
        (expression.place, selector.name, matcher.name)
        for expression in EXPRESSIONS
        for selector in selectors(expression.text)
        for matcher in selector.matchers.matchers
        if selector.name in known and matcher.name not in known[selector.name] | TARGET_LABELS
    ]
    assert unknown == []


def test_every_metric_of_ours_is_shown_or_watched(ours):
    named = {name for expression in EXPRESSIONS for name in metrics(expression.text)}
    unused = [family.name for family in ours if not named.intersection(exported.series(family))]
    assert unused == [], "put it on a dashboard or into a rule, or do not export it"


def test_what_is_recorded_is_read():
    read = {name for expression in EXPRESSIONS for name in metrics(expression.text)}
    assert read >= RECORDED


def test_our_families_all_have_samples_to_tell_their_labels_from(ours):
    assert [family.name for family in ours if not family.samples] == []


def test_the_objectives_limits_are_buckets_of_vllms_histograms(vllms):
    buckets = {
        (sample.name, sample.labels["le"]) for family in vllms for sample in family.samples if "le" in sample.labels
    }
    limits = {
        (selector.name, matcher.value)
        for rule in rule_expressions()
        for selector in selectors(rule.text)
        for matcher in selector.matchers.matchers
        if matcher.name == "le"
    }
    assert limits
    assert limits <= buckets


def test_the_reference_is_up_to_date():
    assert reference.PAGE.read_text() == reference.page(), "run `python -m deploy.metrics.reference`"
