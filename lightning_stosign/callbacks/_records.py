"""Writing a step's records to Lightning's loggers."""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

from lightning_stosign._lightning_names import is_a, like
from lightning_stosign._lightning_private import tag_prefix
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
    counts = {f"{prefix}/{tag}": numbers for tag, numbers in histograms.items()}
    for logger in loggers:
        if is_a(logger, MLFlowLogger):
            # It has no ':', '=' and ',' in names, as in "fp8-raw:static_scale=1024".
            logger.log_metrics({re.sub(r"[^\w/. -]", "_", tag): value for tag, value in metrics.items()}, step=step)
        elif is_a(logger, WandbLogger):
            logger.log_metrics({**metrics, **_wandb_histograms(counts)}, step=step)
        elif is_a(logger, TensorBoardLogger):
            _write_event(logger, metrics, counts, step)
        else:
            logger.log_metrics(metrics, step=step)


def put_into_callback_metrics(trainer: Trainer, prefix: str, scalars: Mapping[str, float]) -> None:
    """Make scalars known to other callbacks, such as EarlyStopping and ModelCheckpoint.

    ``LightningModule.log`` would send them to the loggers a second time, and cannot be called in an optimizer's hooks.
    """
    trainer.callback_metrics.update(
        {f"{prefix}/{tag}": torch.tensor(value, dtype=torch.float32, device="cpu") for tag, value in scalars.items()}
    )


def _wandb_histograms(histograms: Mapping[str, Sequence[float]]) -> dict[str, float]:
    import wandb

    edges = log10_bin_edges().numpy()
    return {tag: wandb.Histogram(np_histogram=(np.asarray(counts), edges)) for tag, counts in histograms.items()}


def _write_event(
    logger: TensorBoardLogger, metrics: Mapping[str, float], histograms: Mapping[str, Sequence[float]], step: int
) -> None:
    """Write all as one event: thousands, one a tag, would wait for the thread that writes them to the file."""
    if (
        type(logger).log_metrics is not like(logger, TensorBoardLogger).log_metrics
    ):  # a subclass has its own way with metrics
        logger.log_metrics(metrics, step=step)
        metrics = {}
    prefix = tag_prefix(logger)
    values = [Summary.Value(tag=prefix + tag, simple_value=value) for tag, value in metrics.items()]
    edges = log10_bin_edges().tolist()
    values += [Summary.Value(tag=prefix + tag, histo=_histogram(counts, edges)) for tag, counts in histograms.items()]
    logger.experiment._get_file_writer().add_summary(Summary(value=values), step)


def _histogram(counts: Sequence[float], edges: Sequence[float]) -> HistogramProto:
    """Return counts of log10 magnitudes as a histogram; an empty one (all entries are 0) has one empty bin."""
    filled = [i for i, count in enumerate(counts) if count > 0] or [0]
    first, last = filled[0], filled[-1] + 1
    used = counts[first:last]
    middles = [(low + high) / 2 for low, high in zip(edges[first:last], edges[first + 1 : last + 1], strict=True)]
    return HistogramProto(
        min=edges[first],
        max=edges[last],
        num=sum(used),
        sum=sum(count * middle for count, middle in zip(used, middles, strict=True)),
        sum_squares=sum(count * middle**2 for count, middle in zip(used, middles, strict=True)),
        bucket_limit=edges[first + 1 : last + 1],
        bucket=used,
    )
