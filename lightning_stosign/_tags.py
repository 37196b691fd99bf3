"""The names and descriptions of what the monitors log.

TensorBoard makes a group of what stands before a tag's first slash. All global tags share the group
``optimizer_state``; the tags of single layers have a group per statistic, ``per_layer_<statistic>``, which sorts after
it.
"""

import warnings
from collections.abc import Container, Iterable

PREFIX = "optimizer_state"
LAYER_PREFIX = "per_layer_"

_DESCRIPTIONS = {
    "zero_fraction": "Share of the state's entries that are equal to 0.",
    "abs_max": "Largest magnitude in the state.",
    "rms": "Root mean square of the state.",
    "underflow_fraction": "Share of nonzero entries that this format would store as 0.",
    "stalled_fraction": "Share of entries whose next change this format would round away.",
    "dead_fraction": "Share of coordinates with numerator 0 and denominator 0: they cannot move.",
    "exploding_fraction": "Share of coordinates with denominator 0 and numerator not: the quotient explodes. "
    "0.1% is enough to break training.",
    "update_rms": "RMS of the step taken, without weight decay, divided by lr. About 0.2 to 1 for AdamW, 1 for sign "
    "methods.",
    "grad_rms": "RMS of the gradient before clipping.",
    "parameter_rms": "RMS of the parameters after the step.",
    "update_to_weight": "RMS of the step taken, weight decay included, over RMS of the parameters before it.",
    "lost_update_fraction": "Share of the coordinates that should move and are as before: their step is below half the "
    "spacing of the parameter's dtype.",
    "update_grad_cosine": "Cosine between the step taken and the descent direction, minus the gradient.",
    "noise_rms": "Stochastic sign: how much of the step is noise, sqrt(mean(1 - u^2)).",
    "sign_agreement": "Stochastic sign: probability of following the momentum's sign.",
    "grad_abs_max": "Largest magnitude of the gradient before clipping.",
    "grad_square_max": "Square of the largest magnitude of the gradient before clipping.",
    "step_size": "Step size that the self-tuning optimizer found, learning rate included.",
    "log10_quantile": "Quantile of log10 of the nonzero magnitudes.",
    "log10_abs": "Histogram of log10 of the nonzero magnitudes.",
}


def description(tag: str) -> str:
    """Return what a tag of :class:`Snapshot` says, in one sentence; empty for an unknown statistic."""
    return _DESCRIPTIONS.get(tag.partition("/")[0], "")


def full_tags(tags: Iterable[str], *, prefix: str = PREFIX, optimizer: str = "", old: bool = False) -> dict[str, str]:
    """Return the names under which the records of a snapshot are logged.

    Args:
        tags: of :meth:`Snapshot.records`: ``<tag>`` and ``<tag>/<layer>``.
        prefix: the group of global tags.
        optimizer: ``"<number>-<class>/"`` where there are several.
        old: keep the tags of layers beside the global ones, as version 0.1 did.

    Returns:
        The logged name of each tag.

    Example:
        >>> full_tags(["rms/exp_avg", "rms/exp_avg/net.0.weight"])["rms/exp_avg/net.0.weight"]
        'per_layer_rms/exp_avg/net.0.weight'
    """
    known = dict.fromkeys(tags)
    layer_prefix = LAYER_PREFIX if prefix == PREFIX else f"{prefix}_{LAYER_PREFIX}"
    names = {}
    for tag in known:
        if old or not _is_of_a_layer(tag, known):
            names[tag] = f"{prefix}/{optimizer}{tag}"
        else:
            statistic, _, rest = tag.partition("/")
            names[tag] = f"{layer_prefix}{statistic}/{optimizer}{rest}"
    return names


def _is_of_a_layer(tag: str, known: Container[str]) -> bool:
    """Whether a part of the tag is the global tag of the same statistic."""
    end = tag.find("/")
    while end >= 0:
        if tag[:end] in known:
            return True
        end = tag.find("/", end + 1)
    return False


def warn_of_old_tags(owner: str) -> None:
    """Say that ``old_tags=True`` goes away."""
    warnings.warn(
        f"{owner}(old_tags=True) is deprecated and goes away in version 0.3: layers are logged as "
        "per_layer_<tag>/<name>",
        DeprecationWarning,
        stacklevel=3,
    )
