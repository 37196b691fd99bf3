"""What the workers' gradients of one parameter become, in plain numpy: the oracle of the exchange."""

import numpy as np
from reference import coins, key, noise

WORKER, TIE = 3, 4  # streams of the noise


def worker_noise(seed, rank, step, index, numel):
    return noise(key(key(seed, rank, 0, WORKER), step, index, WORKER), numel).astype(np.float32)


def exchanged(grads, aggregation, stochastic, seed, step, index):
    """Return the aggregated gradient of a parameter, and what each worker's sign lost of its own.

    Args:
        grads: float32, shape [workers, numel].
    """
    workers, numel = grads.shape
    if stochastic:
        scale = np.abs(grads).max()
        noises = [worker_noise(seed, rank, step, index, numel) for rank in range(workers)]
        positive = grads + scale * np.stack(noises) > 0
    else:
        scale = np.abs(grads.astype(np.float64)).mean(1).mean()
        alternating = (step + np.arange(workers)) % 2 == 0
        positive = np.where(alternating[:, None], grads >= 0, grads > 0)
    lost = grads - scale * np.where(positive, 1, -1)
    count = positive.sum(0)
    if aggregation == "mean":
        return scale * (2 * count - workers) / workers, lost
    tie_won = coins(key(seed, step, index, TIE), numel)
    won = np.where(2 * count == workers, tie_won, 2 * count > workers)
    return scale * np.where(won, 1, -1), lost
