"""The communication benchmark: what the kernel counts on the card, and how it says that it cannot run here."""

import os

import pytest
from communication import BASELINE, measured, traffic
from hosts import NotPossibleError, hosts


def test_machine_that_allows_no_namespaces_says_why(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotPossibleError, match="network namespaces need Linux and root"), hosts(2):
        pass


def test_missing_tool_is_named(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotPossibleError, match="ip and tc not found: install iproute2"), hosts(2):
        pass


def test_comparison_without_a_baseline_is_refused():
    with pytest.raises(ValueError, match="must name 'DDP float32'"):
        traffic(methods=["sign mean"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_kernel_counts_a_28th_of_the_bytes_for_a_vote_and_a_12th_for_the_mean(workers):
    methods = [BASELINE, "sign mean", "sign majority"]
    try:
        results = measured("traffic", workers, timeout=280, methods=methods, size="10m", steps=2)
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    total = {method: sum(result[method] for result in results) for method in methods}
    assert total["sign majority"] <= total[BASELINE] / 28
    assert total["sign mean"] <= total[BASELINE] / 12


@pytest.mark.slow
def test_shaped_link_is_as_slow_as_it_should_be():
    options = {"methods": [BASELINE, "sign majority"], "size": "1m", "steps": 3, "rates": [20.0], "batch_size": 1}
    try:
        result, _ = measured("steps", 2, timeout=280, **options)
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    ((whole, exposed),), ((_, sign_exposed),) = result[BASELINE], result["sign majority"]
    assert 0.9 * 0.84 * 32 / 20 < whole < 4 * 0.84 * 32 / 20  # 0.84 M values of 32 bits at 20 Mbit/s
    assert sign_exposed < exposed / 4
