import pytest

from server.errors import RefusalError
from server.limits import AdmissionLimits
from server.rates import KeyRates


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_requests_of_a_key_in_a_minute(clock):
    rates = KeyRates(AdmissionLimits(key_requests_per_minute=6), clock)
    for _ in range(6):
        rates.take_request("a")
    with pytest.raises(RefusalError) as caught:
        rates.take_request("a")
    assert (caught.value.status, caught.value.reason, caught.value.retry_after) == (429, "key_rate", 10)
    rates.take_request("b")
    rates.take_request(None)
    clock.now += 10
    rates.take_request("a")
    with pytest.raises(RefusalError):
        rates.take_request("a")


def test_tokens_are_charged_when_they_are_known_and_paid_back(clock):
    rates = KeyRates(AdmissionLimits(key_tokens_per_minute=600), clock)
    rates.take_request("a")
    rates.take_tokens("a", 900)
    with pytest.raises(RefusalError) as caught:
        rates.take_request("a")
    assert caught.value.retry_after == pytest.approx(30.1)
    clock.now += 31
    rates.take_request("a")


def test_a_bucket_never_holds_more_than_a_minutes_worth(clock):
    rates = KeyRates(AdmissionLimits(key_requests_per_minute=2), clock)
    rates.take_request("a")
    clock.now += 3600
    rates.take_request("a")
    rates.take_request("a")
    with pytest.raises(RefusalError):
        rates.take_request("a")


def test_without_limits_nothing_is_kept(clock):
    rates = KeyRates(AdmissionLimits(), clock)
    for _ in range(1000):
        rates.take_request("a")
        rates.take_tokens("a", 10**9)
    assert rates._requests == rates._tokens == {}
