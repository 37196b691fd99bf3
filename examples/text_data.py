"""Any text as training data, and a position in it that survives a restart.

A training window is a pure function of (seed, number of the window), so that a resumed run needs only the number of the
next one to see exactly the batches it would have seen.
"""

import math
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from glob import glob
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

BYTES = 256
GPT2_TOKENS = 50257


class TextDataModule(LightningDataModule):
    """Windows of text for a language model: batches of (tokens, next tokens), each of shape (batch_size, context).

    Text files are read as bytes, so that any file is text and the vocabulary has 256 tokens. A file that ends in `.bin`
    holds tokens as nanoGPT writes them (uint16, little-endian) and is memory-mapped, not read.

    Args:
        paths: Files or globs of the training text; by default the source of Python's own standard library. Several text
            files are joined; of `.bin` files there may be one.
        val_paths: The same for the validation text (nanoGPT's `val.bin`); by default the end of the training text.
        context: Tokens in a window.
        batch_size: Windows in a batch, on each device.
        val_fraction: Share of the text that is kept for validation, in (0, 1); unused where `val_paths` is given.
        seed: Selects the training windows.
        num_workers: Processes that load batches beside the main one.
        vocab_size: Number of different tokens; by default 256 for text and GPT-2's 50257 for `.bin` files.

    Raises:
        ValueError: If an argument is out of range, a path matches no file, the text is too short or a token too large.
    """

    def __init__(
        self,
        paths: list[str] | None = None,
        val_paths: list[str] | None = None,
        context: int = 128,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        at_least = {"context": (context, 1), "batch_size": (batch_size, 1), "num_workers": (num_workers, 0)}
        for name, (value, least) in at_least.items():
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction must be in (0, 1), got {val_fraction}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        if vocab_size is not None and not 1 <= vocab_size <= 2**16:
            raise ValueError(f"vocab_size must be in [1, 65536], got {vocab_size}")
        self.paths = [f"{sysconfig.get_paths()['stdlib']}/*.py"] if paths is None else paths
        self.val_paths = val_paths
        self.context, self.batch_size, self.val_fraction = context, batch_size, val_fraction
        self.seed, self.num_workers, self.vocab_size = seed, num_workers, vocab_size

    def setup(self, stage: str) -> None:
        train = read_tokens("paths", self.paths)
        if self.val_paths is None:
            split = round(len(train) * (1 - self.val_fraction))
            train, val = train[:split], train[split:]
            hint = f" with val_fraction={self.val_fraction}"
        else:
            val, hint = read_tokens("val_paths", self.val_paths), ""
            if val.dtype != train.dtype:
                raise ValueError(f"paths and val_paths must both be text or both .bin files, got {self.val_paths}")
        for name, tokens in (("training", train), ("validation", val)):
            if len(tokens) <= self.context:
                raise ValueError(
                    f"the {name} text has {len(tokens)} tokens{hint}, context={self.context} needs at least"
                    f" {self.context + 1}"
                )
        if self.vocab_size is None:
            self.vocab_size = BYTES if train.dtype == np.uint8 else GPT2_TOKENS
        self.train_windows = TrainingWindows(train, self.context, self.vocab_size, self.seed)
        self.val_windows = ValidationWindows(val, self.context, self.vocab_size)

    def train_dataloader(self) -> DataLoader:
        ranks, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        if len(self.train_windows) < self.batch_size * ranks:
            raise ValueError(
                f"batch_size must be at most {len(self.train_windows) // ranks}, got {self.batch_size}: the training"
                f" text has {len(self.train_windows)} windows of context={self.context} for {ranks} process(es)"
            )
        return StreamLoader(
            self.train_windows,
            sampler=StreamSampler(self.train_windows, ranks, rank),
            batch_size=self.batch_size,
            drop_last=True,
            collate_fn=inputs_and_targets,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(
            self.val_windows,
            batch_size=self.batch_size,
            collate_fn=inputs_and_targets,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


def read_tokens(argument: str, patterns: list[str]) -> NDArray:
    """Return the bytes of text files joined by newlines, or one `.bin` file as a memory-mapped array of uint16."""
    files = []
    for pattern in patterns:
        matches = sorted(path for path in glob(pattern, recursive=True) if Path(path).is_file())
        if not matches:
            raise ValueError(f"{argument} must name existing files or globs that match some, got {pattern!r}")
        files += matches
    if not files:
        raise ValueError(f"{argument} must name at least one file, got an empty list")
    if not any(file.endswith(".bin") for file in files):
        return np.frombuffer(b"\n".join(Path(file).read_bytes() for file in files), dtype=np.uint8)
    if len(files) > 1:
        raise ValueError(f"{argument} must be text files or a single .bin file, got {files}")
    size = Path(files[0]).stat().st_size
    if size == 0 or size % 2 != 0:
        raise ValueError(f"{argument} must name a .bin file of uint16 tokens, got {files[0]!r} of {size} bytes")
    return np.memmap(files[0], dtype="<u2", mode="r")


class Windows(Dataset[Tensor], ABC):
    """Windows of `context + 1` tokens, gathered a batch at a time; a subclass says where a window starts."""

    def __init__(self, tokens: NDArray, context: int, vocab_size: int) -> None:
        self.tokens, self.context, self.vocab_size = tokens, context, vocab_size
        # Text of n windows has a target for the last token of each only if one more token follows.
        self.windows = (len(tokens) - 1) // context

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Return a batch of windows, int64, of shape (len(indices), context + 1)."""
        starts = self.starts(np.array(indices, dtype=np.uint64)).astype(np.int64)
        batch = self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)
        # Here and not in setup: a look at every token of a file of gigabytes would delay the start by minutes.
        if (largest := batch.max()) >= self.vocab_size:
            raise ValueError(f"vocab_size must be greater than every token, got {self.vocab_size} and token {largest}")
        return torch.from_numpy(batch)

    @abstractmethod
    def starts(self, indices: NDArray[np.uint64]) -> NDArray[np.uint64]: ...


class TrainingWindows(Windows):
    """Windows at pseudo-random places; there is one for every index, also beyond the length, which counts one epoch."""

    def __init__(self, tokens: NDArray, context: int, vocab_size: int, seed: int) -> None:
        super().__init__(tokens, context, vocab_size)
        self.key = splitmix64(np.array([seed], dtype=np.uint64))

    def starts(self, indices: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return splitmix64(indices ^ self.key) % np.uint64(len(self.tokens) - self.context)


class ValidationWindows(Windows):
    """Windows side by side that cover the text once, in an order whose first k, for any k, are spread evenly over it.

    `limit_val_batches` therefore takes a fair sample of the text, not its beginning.
    """

    def __init__(self, tokens: NDArray, context: int, vocab_size: int) -> None:
        super().__init__(tokens, context, vocab_size)
        # Golden-ratio steps spread points evenly over a circle; a step coprime to their number visits each once.
        golden = round(self.windows * (math.sqrt(5) - 1) / 2)
        self.step = np.uint64(next(step for step in count(golden) if math.gcd(step, self.windows) == 1))

    def starts(self, indices: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return indices * self.step % np.uint64(self.windows) * np.uint64(self.context)


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit integers to 64-bit integers: one step of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def inputs_and_targets(batch: Any) -> tuple[Tensor, Tensor]:
    return batch[:, :-1], batch[:, 1:]


class StreamSampler(DistributedSampler):
    """Deals out 0, 1, 2, ... to the ranks in turn, without end: an epoch is a stretch of the stream, not a fresh start.

    A DistributedSampler, because Lightning leaves one in place. It has no use for `set_epoch`, which Lightning calls
    only after it has made the iterator, and after a restart from the end of an epoch with a number one too high.
    """

    def __init__(self, windows: Windows, ranks: int, rank: int) -> None:
        super().__init__(windows, num_replicas=ranks, rank=rank, shuffle=False, drop_last=True)
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        return count(self.position + self.rank, self.num_replicas)


class StreamLoader(DataLoader):
    """Counts what it hands out, not what its workers prefetch, and goes on from there; Lightning saves the position.

    The stream has no end, and the loader's length is an epoch's. Where Trainer(overfit_batches=...) has replaced the
    sampler, to see the same batches again, there is no position.
    """

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if isinstance(self.sampler, StreamSampler):
                self.sampler.position += len(batch[0]) * self.sampler.num_replicas
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.sampler.position} if isinstance(self.sampler, StreamSampler) else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if isinstance(self.sampler, StreamSampler):
            self.sampler.position = state["position"]
