"""Writing a step's records to Lightning's loggers."""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_stosign.health.magnitudes import log10_bin_edges


def log_records(
    loggers: Iterable[Logger],
    prefix: str,
    scalars: Mapping[str, float],
    histograms: Mapping[str, Sequence[float]],
    step: int,
) -> None:
    """Write scalars to every logger, and histograms of log10 magnitudes to those that show some.

    Args:
        loggers: the trainer's.
        prefix: goes before each tag, with a slash.
        scalars: values by tag.
        histograms: counts of the bins of :func:`log10_bin_edges` by tag.
        step: what the records are for.
    """
    metrics = {f"{prefix}/{tag}": value for tag, value in scalars.items()}
    for logger in loggers:
        if isinstance(logger, MLFlowLogger):
            # It has no ':', '=' and ',' in names, as in "fp8-raw:static_scale=1024".
            logger.log_metrics({re.sub(r"[^\w/. -]", "_", tag): value for tag, value in metrics.items()}, step=step)
        elif isinstance(logger, WandbLogger):
            logger.log_metrics({**metrics, **_wandb_histograms(prefix, histograms)}, step=step)
        else:
            logger.log_metrics(metrics, step=step)
        if isinstance(logger, TensorBoardLogger):
            for tag, counts in histograms.items():
                _add_histogram(logger, f"{prefix}/{tag}", counts, step)


def _wandb_histograms(prefix: str, histograms: Mapping[str, Sequence[float]]) -> dict[str, float]:
    import wandb

    edges = log10_bin_edges().numpy()
    return {
        f"{prefix}/{tag}": wandb.Histogram(np_histogram=(np.asarray(counts), edges))
        for tag, counts in histograms.items()
    }


def _add_histogram(logger: TensorBoardLogger, tag: str, counts: Sequence[float], step: int) -> None:
    """Write counts of log10 magnitudes; an empty histogram (all entries are 0) is one empty bin."""
    edges = log10_bin_edges().tolist()
    filled = [i for i, count in enumerate(counts) if count > 0] or [0]
    first, last = filled[0], filled[-1] + 1
    used = counts[first:last]
    middles = [(low + high) / 2 for low, high in zip(edges[first:last], edges[first + 1 : last + 1], strict=True)]
    logger.experiment.add_histogram_raw(
        tag,
        min=edges[first],
        max=edges[last],
        num=sum(used),
        sum=sum(count * middle for count, middle in zip(used, middles, strict=True)),
        sum_squares=sum(count * middle**2 for count, middle in zip(used, middles, strict=True)),
        bucket_limits=edges[first + 1 : last + 1],
        bucket_counts=used,
        global_step=step,
    )
