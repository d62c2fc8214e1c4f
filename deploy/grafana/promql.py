"""The few shapes of PromQL that the boards are written in. Every selector follows the boards' variables."""


def select(metric: str, **labels: str) -> str:
    """The series of ``metric`` that the variables choose; a label's value that starts with ``~`` is a regular expression."""
    chosen = ['job=~"$job"', 'instance=~"$instance"']
    for label, value in labels.items():
        operator = "=~" if value.startswith("~") else "="
        chosen.append(f'{label}{operator}"{value.removeprefix("~")}"')
    return f"{metric}{{{', '.join(chosen)}}}"


def rate(metric: str, **labels: str) -> str:
    """Per second, per series."""
    return f"rate({select(metric, **labels)}[$__rate_interval])"


def total(metric: str, *, by: str = "", **labels: str) -> str:
    """Per second, summed."""
    return f"{_aggregate('sum', by)} ({rate(metric, **labels)})"


def in_range(metric: str, *, by: str = "", **labels: str) -> str:
    """Growth over the whole time range of the board, summed."""
    return f"{_aggregate('sum', by)} (increase({select(metric, **labels)}[$__range]))"


def gauge(operator: str, metric: str, *, by: str = "", **labels: str) -> str:
    """A gauge's series joined by ``sum``, ``avg``, ``min`` or ``max``."""
    return f"{_aggregate(operator, by)} ({select(metric, **labels)})"


def quantile(q: float, histogram: str, *, by: str = "") -> str:
    """A quantile of a histogram, over all chosen series or for each ``by``."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {total(histogram + '_bucket', by=labels)})"


def mean(summary: str, *, by: str = "") -> str:
    """The mean of what a histogram or summary observed."""
    return f"{total(summary + '_sum', by=by)} / {total(summary + '_count', by=by)}"


def or_zero(expression: str) -> str:
    """Zero where there is no series yet: a labelled counter has none before its first event."""
    return f"({expression} or vector(0))"


def _aggregate(operator: str, by: str) -> str:
    return f"{operator} by ({by})" if by else operator
