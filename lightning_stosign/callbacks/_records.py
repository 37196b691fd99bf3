"""Writing a step's records to Lightning's loggers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_SCALAR,
    DATA_CLASS_TENSOR,
    HistogramProto,
    Summary,
    SummaryMetadata,
)
from tensorboard.plugins.histogram import metadata as histogram_plugin
from tensorboard.plugins.scalar import metadata as scalar_plugin

from lightning_stosign._lightning_names import is_a, like
from lightning_stosign._lightning_private import tag_prefix
from lightning_stosign.health.magnitudes import log10_bin_edges


def log_records(
    loggers: Iterable[Logger],
    scalars: Mapping[str, float],
    histograms: Mapping[str, Sequence[float]],
    step: int,
    descriptions: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write scalars to every logger, and histograms of log10 magnitudes to those that show some.

    Args:
        loggers: the trainer's.
        scalars: values by tag.
        histograms: counts of the bins of :func:`log10_bin_edges` by tag.
        step: what the records are for.
        descriptions: what TensorBoard is to say about a tag. It reads those of a tag's first record.
    """
    for logger in loggers:
        if is_a(logger, MLFlowLogger):
            # It has no ':', '=' and ',' in names, as in "fp8-raw:static_scale=1024".
            logger.log_metrics({re.sub(r"[^\w/. -]", "_", tag): value for tag, value in scalars.items()}, step=step)
        elif is_a(logger, WandbLogger):
            logger.log_metrics({**scalars, **_wandb_histograms(histograms)}, step=step)
        elif is_a(logger, TensorBoardLogger):
            _write_event(logger, scalars, histograms, step, descriptions)
        else:
            logger.log_metrics(dict(scalars), step=step)


def put_into_callback_metrics(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Make scalars known to other callbacks, such as EarlyStopping and ModelCheckpoint.

    ``LightningModule.log`` would send them to the loggers a second time, and cannot be called in an optimizer's hooks.
    """
    values = torch.tensor(list(scalars.values()), dtype=torch.float32, device="cpu")
    trainer.callback_metrics.update(zip(scalars, values.unbind(), strict=True))  # views: one allocation for thousands


def _wandb_histograms(histograms: Mapping[str, Sequence[float]]) -> dict[str, float]:
    import wandb

    edges = log10_bin_edges().numpy()
    return {tag: wandb.Histogram(np_histogram=(np.asarray(counts), edges)) for tag, counts in histograms.items()}


def _write_event(
    logger: TensorBoardLogger,
    metrics: Mapping[str, float],
    histograms: Mapping[str, Sequence[float]],
    step: int,
    descriptions: Mapping[str, str],
) -> None:
    """Write all as one event: thousands, one a tag, would wait for the thread that writes them to the file."""
    if (
        type(logger).log_metrics is not like(logger, TensorBoardLogger).log_metrics
    ):  # a subclass has its own way with metrics
        logger.log_metrics(dict(metrics), step=step)
        metrics = {}
    prefix = tag_prefix(logger)

    def metadata(tag: str, plugin: str, data_class: int) -> SummaryMetadata | None:
        text = descriptions.get(tag)
        if not text:
            return None
        # Without its class TensorBoard's fast loader drops the description.
        plugin_data = SummaryMetadata.PluginData(plugin_name=plugin)
        return SummaryMetadata(summary_description=text, plugin_data=plugin_data, data_class=data_class)

    summary = Summary()
    for tag, value in metrics.items():
        about = metadata(tag, scalar_plugin.PLUGIN_NAME, DATA_CLASS_SCALAR)
        summary.value.add(tag=prefix + tag, simple_value=value, metadata=about)
    edges = log10_bin_edges().numpy()
    for tag, counts in histograms.items():
        about = metadata(tag, histogram_plugin.PLUGIN_NAME, DATA_CLASS_TENSOR)
        summary.value.add(tag=prefix + tag, histo=_histogram(counts, edges), metadata=about)
    logger.experiment._get_file_writer().add_summary(summary, step)


def _histogram(counts: Sequence[float], edges: NDArray[np.float64]) -> HistogramProto:
    """Return counts of log10 magnitudes as a histogram; an empty one (all entries are 0) has one empty bin."""
    every = np.asarray(counts, dtype=np.float64)
    filled = every.nonzero()[0]
    first, last = (filled[0], filled[-1] + 1) if len(filled) else (0, 1)
    used = every[first:last]
    middles = (edges[first:last] + edges[first + 1 : last + 1]) / 2
    return HistogramProto(
        min=edges[first],
        max=edges[last],
        num=used.sum(),
        sum=used @ middles,
        sum_squares=used @ middles**2,
        bucket_limit=edges[first + 1 : last + 1].tolist(),
        bucket=used.tolist(),
    )
