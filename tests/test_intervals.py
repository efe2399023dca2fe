"""Bootstrap intervals over users."""

import warnings

import numpy as np
import pytest
from scipy.stats import binom, bootstrap

from rarec.ranking.metrics import Interval, mean_intervals, paired_intervals


def mean_interval(values, resamples: int = 2000, seed: int = 0) -> Interval:
    """The interval of one metric."""
    return mean_intervals({"metric": np.asarray(values)}, resamples, seed)["metric"]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_equal_to_scipy_on_the_values_themselves():
    """We resample users and weigh; scipy resamples values and averages. Same seed, same draws, same interval."""
    values = np.random.default_rng(3).exponential(size=37)
    scipys = bootstrap((values,), np.mean, n_resamples=500, method="percentile", rng=np.random.default_rng(5))
    found = mean_interval(values, resamples=500, seed=5)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(scipys.confidence_interval))


def test_a_hit_rate_has_the_interval_of_a_binomial():
    hits = np.array([1.0] * 30 + [0.0] * 70)
    interval = mean_interval(hits, resamples=5000, seed=0)
    assert (interval.low, interval.high) == pytest.approx(binom.interval(0.95, 100, 0.3) / np.float64(100), abs=0.02)


def test_many_metrics_share_resamples_and_keep_their_own_intervals():
    rng = np.random.default_rng(0)
    values = {"a": rng.random(50), "b": rng.random(50)}
    together = mean_intervals(values, 300, 7)
    assert list(together) == ["a", "b"]
    for name, column in values.items():
        assert together[name] == pytest.approx(mean_interval(column, 300, 7))


def test_the_seed_decides():
    values = np.random.default_rng(0).random(30)
    assert mean_interval(values, 200, 1) == mean_interval(values, 200, 1)
    assert mean_interval(values, 200, 1) != mean_interval(values, 200, 2)


def test_small_batches_give_the_same_interval(monkeypatch):
    """Memory is bounded by drawing in batches; the draws are the same."""
    values = np.random.default_rng(0).random(30)
    whole = mean_interval(values, 200, 1)
    monkeypatch.setattr("rarec.ranking.metrics.BATCH_BYTES", 7 * 8 * 30)
    assert mean_interval(values, 200, 1) == pytest.approx(whole)


def test_pairing_sees_a_small_steady_difference():
    """Users differ much, the variants by a steady 0.01: only the paired interval excludes 0."""
    rng = np.random.default_rng(0)
    b = rng.random(200)
    a = b + 0.01 + 0.001 * rng.standard_normal(200)
    paired = paired_intervals({"metric": a}, {"metric": b}, 500, 0)["metric"]
    assert 0.009 < paired.low < paired.mean < paired.high < 0.011
    assert mean_interval(a, 500, 0).low < mean_interval(b, 500, 0).high


@pytest.mark.parametrize("values", [[0.0] * 10, [0.25], [1.0, 1.0]])
def test_degenerate_values_have_a_point_for_an_interval(values):
    assert mean_interval(values) == (values[0], values[0], values[0])


def test_no_users_is_an_error():
    with pytest.raises(ValueError, match="at least one user"):
        mean_interval([])
