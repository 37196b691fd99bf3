"""Parameter-free sign descent in plain numpy, and the problem that its tests solve. Slow and obvious on purpose."""

import numpy as np


def alias(
    x,
    losses,
    gradients,
    *,
    beta1=0.0,
    beta2=None,
    bound=None,
    d0=None,
    weight_decay=0.0,
    measure_every=1,
    factors=None,
    along_step=False,
):
    """arXiv 2506.03725, Algorithms 2 and 3: gradients[t](x) is the gradient of step t's batch. Returns the iterates."""
    m, v, eta, curvature, decrease, iterates = np.zeros_like(x), np.zeros_like(x), 0.0, 0.0, 0.0, []
    f0 = losses[0](x)
    d0 = 1e-3 * abs(f0) if d0 is None else d0
    d = d0 if bound is None else f0 - bound
    previous = None
    for t, gradient in enumerate(gradients):
        g = gradient(x)
        if previous is not None:
            if t <= measure_every or t % measure_every == 0:
                change, motion = (g - gradient(previous)).ravel(), (x - previous).ravel()
                norm = np.abs(motion).max()
                curvature = change @ motion / norm**2 if along_step else np.abs(change).sum() / norm
            eta += max(curvature, 0)
            decrease += g.ravel() @ (previous - x).ravel()
            if along_step:
                decrease += 0.5 * curvature * np.abs(x - previous).max() ** 2
            if bound is None:
                d = max(d, decrease)
        gamma = np.sqrt((2 if along_step else 1) * d / eta) if eta > 0 else d0 / np.abs(g).sum()
        gamma *= 1.0 if factors is None else factors[t]
        if beta2 is None:
            m = beta1 * m + (1 - beta1) * g
            direction = np.sign(m)
        else:
            m = beta1 * m + (1 - beta1) * d * g
            v = beta2 * v + (1 - beta2) * d**2 * g**2
            direction = m / np.sqrt(v)
        previous, x = x, x - gamma * direction - gamma * weight_decay * x
        iterates.append(x)
    return iterates


class LogisticRegression:
    """Mean of log(1 + exp(-y_i <a_i, x>)) over n examples, or a batch of them; the labels are drawn from the model."""

    def __init__(self, n=500, d=30, seed=0):
        rng = np.random.default_rng(seed)
        self.a, truth = rng.standard_normal((n, d)), rng.standard_normal(d)
        self.y = np.where(rng.random(n) < 1 / (1 + np.exp(-self.a @ truth)), 1.0, -1.0)

    def loss(self, x, batch=slice(None)):
        return np.logaddexp(0, -self.y[batch] * (x @ self.a[batch].T)).mean(-1)

    def gradient(self, x, batch=slice(None)):
        """Of shape x.shape: (d,), or one row for each of several points."""
        weight = self.y[batch] / (1 + np.exp(self.y[batch] * (x @ self.a[batch].T)))
        return -weight @ self.a[batch] / len(self.y[batch])

    def batches(self, steps, size, seed):
        """Batches drawn at random, or all examples where size is None."""
        rng = np.random.default_rng(seed)
        return [slice(None) if size is None else rng.choice(len(self.y), size, replace=False) for _ in range(steps)]

    def signsgd_grid(self, step_sizes, batches, beta=0.0):
        """The last losses of SignSGD from 0 with each of the constant step sizes, all at once."""
        x = np.zeros((len(step_sizes), self.a.shape[1]))
        m = np.zeros_like(x)
        for batch in batches:
            m = beta * m + (1 - beta) * self.gradient(x, batch)
            x = x - step_sizes[:, None] * np.sign(m)
        return self.loss(x)
