"""The communication benchmark: what the kernel counts on the card, and how it says that it cannot run here."""

import json
import os
import sys
from contextlib import nullcontext

import communication
import pytest
from communication import WORKER, loss, report, traffic
from links.hosts import NotPossibleError, hosts, run_on
from links.methods import BASELINE
from links.report import Report
from links.store import Key, Store


def test_machine_that_allows_no_namespaces_says_why(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotPossibleError, match="network namespaces need Linux and root"), hosts(2):
        pass


def test_missing_tool_is_named(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotPossibleError, match="ip and tc not found: install iproute2"), hosts(2):
        pass


def traffic_key(method, workers=2):
    return Key("traffic", "1m", workers, None, method)


def test_store_reads_what_it_wrote(tmp_path):
    store = Store(tmp_path / "new" / "all.csv")
    key = Key("steps", "10m", 2, 100.0, "sign majority, plain")
    store.add(key, [(5, "seconds_a_step", 0.61), (5, "seconds_exposed", 0.15)])
    store.add(traffic_key(BASELINE), [(3, "bytes_a_step", 4.3e7)])
    again = Store(tmp_path / "new" / "all.csv")
    assert again.found == store.found and key in again and key._replace(mbit=10.0) not in again
    assert again.value(key, "seconds_exposed") == 0.15 and again.value(key, "bytes_sent") is None


def test_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "all.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"all.csv has the columns \['a', 'b'\]"):
        Store(tmp_path / "all.csv")


def test_only_what_is_missing_is_measured(tmp_path, monkeypatch):
    asked = []

    def ran(names, command):
        asked.append(json.loads(command[-1])["methods"])
        yield from ([None, method, [[3, "bytes_a_step", 1.0]]] for method in asked[-1])

    monkeypatch.setattr(communication, "run_on", ran)
    monkeypatch.setattr(communication, "hosts", lambda count: nullcontext(["a", "b"]))
    Store(tmp_path / "communication.csv").add(traffic_key(BASELINE), [(3, "bytes_a_step", 8.0)])
    methods = [BASELINE, "sign mean"]
    for _ in range(2):
        traffic(methods=methods, size="1m", workers=[2], results=tmp_path)
    assert asked == [["sign mean"]]
    assert "| sign mean | 0 kB (8.0x) |" in (tmp_path / "communication.md").read_text()


def test_clock_needs_the_step_times(tmp_path):
    with pytest.raises(ValueError, match=r"no step time at 50 Mbit/s of \['sign mean'\]: run `steps --rates \[50\]`"):
        loss(methods=["sign mean"], rate=50, results=tmp_path)


def test_losses_are_placed_on_the_clock_and_drawn(tmp_path):
    store = Store(tmp_path / "communication.csv")
    for method, seconds in {BASELINE: 4.5, "PowerSGD rank 1": 1.0, "sign mean": 1.5}.items():
        for mbit in (10.0, 100.0):
            exposed = (seconds - 0.5) * 100 / mbit
            times = [(5, "seconds_a_step", 0.5 + exposed), (5, "seconds_exposed", exposed)]
            store.add(Key("steps", "10m", 2, mbit, method), times)
        points = [(step, what, value) for step in (1, 6) for what, value in (("validation_loss", 9.0 / step),)]
        store.add(Key("loss", "10m", 2, None, method), [*points, (1, "bytes_sent", 1e6), (6, "bytes_sent", 6e6)])
    shown = Report(store, [BASELINE, "PowerSGD rank 1", "sign mean", "absent"], BASELINE, uncompressed=2)
    assert shown.by_time("10m", 100.0, "sign mean") == [(1.5, 9.0), (9.0, 1.5)]
    assert shown.by_time("10m", 100.0, "PowerSGD rank 1") == [(4.5, 9.0), (13.0, 1.5)]  # 2 of 4.5 s, 4 of 1 s
    assert shown.by_time("10m", 10.0, BASELINE) == [(40.5, 9.0), (243.0, 1.5)]
    assert shown.by_time("10m", 100.0, "absent") == []
    assert shown.by_bytes("10m", "sign mean") == [(1.0, 9.0), (6.0, 1.5)]
    report(tmp_path)
    text = (tmp_path / "communication.md").read_text()
    assert "| sign mean | 10.00 s (1/4.0) | 1.00 s (1/4.0) |" in text and "takes 0.50 s with 10.8 M values" in text
    assert "| at 100 Mbit/s | 1 s | 2 s | 4 s | 9 s |" in text and "| sign mean | - | 9.000 | 9.000 | 1.500 |" in text
    assert (tmp_path / "communication.png").stat().st_size > 10_000


def measured(measure, workers, **options):
    """Return what a measurement finds, by method; skip the test where there can be no hosts."""
    try:
        with hosts(workers) as names:
            command = [sys.executable, str(WORKER), measure, json.dumps(options)]
            found = list(run_on(names, command))
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    return {method: {quantity: value for _, quantity, value in values} for _, method, values in found}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4, 8])
def test_kernel_counts_a_28th_of_the_bytes_for_a_vote_and_a_12th_for_the_mean(workers):
    methods = [BASELINE, "sign mean", "sign majority"]
    found = measured("traffic", workers, methods=methods, size="10m", steps=1)
    sent = {method: values["bytes_a_step"] for method, values in found.items()}
    assert sent["sign majority"] <= sent[BASELINE] / 28
    assert sent["sign mean"] <= sent[BASELINE] / 12


@pytest.mark.slow
def test_shaped_link_is_as_slow_as_it_should_be():
    options = {"methods": [BASELINE, "sign majority"], "size": "1m", "steps": 3, "rates": [20.0], "batch_size": 1}
    found = measured("steps", 2, **options)
    assert 0.9 * 0.84 * 32 / 20 < found[BASELINE]["seconds_a_step"] < 4 * 0.84 * 32 / 20  # 0.84 M values of 32 bits
    assert found["sign majority"]["seconds_exposed"] < found[BASELINE]["seconds_exposed"] / 4


@pytest.mark.slow
def test_worker_that_fails_is_named():
    with pytest.raises(RuntimeError, match=r"worker 0 failed: (.|\n)*KeyError: 'gossip'"):
        measured("gossip", 1)
