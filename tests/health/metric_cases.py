"""Every public torchmetric with its batches and its float64 oracle; as a script, two ranks' values of each.

python metric_cases.py RANK STORE_FILE
"""

import datetime
import sys
from functools import partial

import numpy as np
import torch

from lightning_stosign import health
from lightning_stosign.health import log10_bin_edges

RAW = "fp8-raw:min_numel=0"


def batches(width, count=4):
    """Batches with zeros, numbers below E4M3's smallest and large ones; each of ``width`` tensors of one shape."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        arrays = [(rng.standard_normal((5, 8)) * 10.0 ** rng.uniform(-5, 1, (5, 8))) for _ in range(width)]
        for place, array in enumerate(arrays):
            array.reshape(-1)[place :: 3 + number] = 0
        found.append(tuple(torch.from_numpy(array.astype(np.float32)) for array in arrays))
    return found


def together(found, place):
    return np.concatenate([batch[place].double().numpy().reshape(-1) for batch in found])


def e4m3(values):
    spacing = 2.0 ** (np.maximum(np.frexp(values)[1] - 1, -6) - 3)
    return np.clip(np.round(values / spacing) * spacing, -448, 448)


def of_values(function):
    return lambda found: function(together(found, 0))


def of_pairs(function):
    return lambda found: function(together(found, 0), together(found, 1))


def underflow(values):
    return np.mean(e4m3(values[values != 0]) == 0)


def stalled(values, changes):
    stored = e4m3(values)
    return np.mean((e4m3(stored + changes.astype(np.float32)) == stored)[changes != 0])


def histogram(values):
    bits = np.abs(values[values != 0]).astype(np.float32)
    edges = 10.0 ** log10_bin_edges().numpy()
    edges[0], edges[-1] = 0, np.inf
    return np.histogram(bits, np.float32(edges))[0]


def median(values):
    bits = np.abs(values[values != 0]).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return [np.log10(np.quantile(bits.view(np.float32), 0.5, method="inverted_cdf").astype(float))]


def stationarity(found):
    points, gradients = (np.stack([b[i].double().numpy().reshape(-1) for b in found]) for i in (0, 1))
    spread = np.square(np.abs(points - points.mean(0)).max(1)).mean()
    return np.abs(gradients.mean(0)).sum() + 0.1 * spread


def l1(found):
    return np.mean([np.abs(batch[0].double().numpy()).sum() for batch in found])


CASES = {
    "ZeroFraction": (1, {}, of_values(lambda x: np.mean(x == 0))),
    "RootMeanSquare": (1, {}, of_values(lambda x: np.sqrt(np.mean(x**2)))),
    "AbsMax": (1, {}, of_values(lambda x: np.abs(x).max())),
    "UnderflowFraction": (1, {"format": RAW}, of_values(underflow)),
    "StalledFraction": (2, {"format": RAW}, of_pairs(stalled)),
    "DeadFraction": (2, {}, of_pairs(lambda m, v: np.mean((m == 0) & (v == 0)))),
    "ExplodingFraction": (2, {}, of_pairs(lambda m, v: np.mean((m != 0) & (v == 0)))),
    "LogMagnitudeHistogram": (1, {}, of_values(histogram)),
    "LogMagnitudeQuantile": (1, {"quantiles": [0.5]}, of_values(median)),
    "L1Stationarity": (1, {}, l1),
    "GeneralizedStationarity": (2, {"delta": 0.1}, stationarity),
}
WITH_REPLICAS = [name for name in CASES if name not in ("AbsMax", "L1Stationarity", "GeneralizedStationarity")]


def case(name):
    """Return what makes a metric, its batches and its oracle."""
    width, options, oracle = CASES[name]
    return partial(getattr(health, name), **options), batches(width), oracle


def check(found, oracle, message=""):
    np.testing.assert_allclose(np.asarray(found), oracle, rtol=2e-6, err_msg=message)


def main(rank, store):
    """Compare each metric's value over two ranks with the oracle of all their batches."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    for name in CASES:
        make, found, oracle = case(name)
        parts = make(replicated=False) if name in WITH_REPLICAS else make()
        for batch in found[rank::2]:
            check(parts(*batch), oracle([batch]), name)  # forward() is of this rank's batch
        check(parts.compute(), oracle(found), name)
        check(parts.compute(), oracle(found), name)
        parts.update(*found[rank])  # the sync was undone: each rank still has only its own batches
        check(parts.compute(), oracle([*found, *found[:2]]), name)
        on_step = make(dist_sync_on_step=True, **({"replicated": False} if name in WITH_REPLICAS else {}))
        check(on_step(*found[rank]), oracle(found[:2]), name)
        if name in WITH_REPLICAS:
            replicas = make()
            for batch in found:
                replicas(*batch)
            check(replicas.compute(), oracle(found), name)
            replicas.sync()
            check(replicas._total().sum(), make_total(make, found), name)
            replicas.unsync()
    torch.distributed.destroy_process_group()


def make_total(make, found):
    alone = make()
    for batch in found:
        alone.update(*batch)
    return alone._total().sum()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2])
