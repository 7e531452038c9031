"""Batches as a function of the step: ``batches[step]`` for any step, in O(1), from (tokens, sizes, seed) alone.

Targets are the tokens of the stream and inputs the tokens before them, eos before the first; over one epoch every token
is a target exactly once. Nothing is dropped: what does not fill a batch is padded with IGNORE targets. An order of
pieces and drawn lengths, where they are asked for, are made once for each epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmkit.data.order import Indices, Permutation, Pieces, epoch_of, jittered_edges
from lmkit.errors import DataError
from lmkit.ids import check_ids
from lmkit.models.base import IGNORE
from lmkit.rng import derive_key

ORDER = "1"
"""Version of the order, of all kinds of batches: raised when the same seed and step give another batch."""


class TrainingBatch(Protocol):
    """The examples of one optimizer step, as rows. It lies on the host until it is cut."""

    @property
    def starts_text(self) -> bool:
        """Whether the rows begin anew, so that carried state must be reset before this batch."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows of the batch, those that only fill it up included."""
        ...

    @property
    def num_targets(self) -> int:
        """What the summed loss is divided by: scored tokens, examples or pairs."""
        ...

    def cut(self, rows: slice, device: torch.device) -> Self:
        """The micro-batch of these rows, on the device."""
        ...

    def rows(self, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
        """Each row that has targets, with ``row``, ``text`` and ``ids``, for people."""
        ...


class Batches(Protocol):
    """Training data as a function of the step."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches per pass over the data."""
        ...

    def __getitem__(self, step: int) -> TrainingBatch:
        """The batch of any step >= 0."""
        ...


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for what the device has to do before."""
    if device.type == "cuda":  # from other memory CUDA copies more than 64 KB when the device has come to it
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads."""

    inputs_BT: Tensor
    """int64; the token before each target, eos_id where padded."""
    targets_BT: Tensor
    """int64; IGNORE where padded."""
    starts_text: bool
    """Whether the rows begin anew, so that carried state must be reset before this batch."""

    @property
    def num_rows(self) -> int:
        """Rows, padded ones included."""
        return len(self.inputs_BT)

    @property
    def num_targets(self) -> int:
        """Targets that are not IGNORE."""
        return int((self.targets_BT != IGNORE).sum())

    def cut(self, rows: slice, device: torch.device) -> Batch:
        """These rows, on the device."""
        inputs_BT, targets_BT = (to_device(t[rows], device) for t in (self.inputs_BT, self.targets_BT))
        return Batch(inputs_BT, targets_BT, self.starts_text)

    def rows(self, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
        """The targets of each row that has any, as ids and text, for people."""
        filled = [(row, [i for i in ids if i != IGNORE]) for row, ids in enumerate(self.targets_BT.tolist())]
        return [{"row": row, "text": decode(ids), "ids": ids} for row, ids in filled if ids]


class Lanes:
    """The stream cut into ``batch_size`` contiguous lanes of ceil(N / batch_size) tokens, read side by side.

    Row b of batch k continues row b of batch k - 1, for models that carry their state (Zaremba et al. 2014). The last
    lanes may be shorter. The first token of a lane is conditioned on the token before it in the stream.

    Every epoch is the same, unless the text is cut into ``pieces``, which come in another order in each: the state is
    carried on from one to the next as it is from document to document, and begins anew with the epoch only. With
    ``jitter`` the lengths of the batches of an epoch are drawn (see ``jittered_edges``); their number is the same.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        eos_id: int,
        batch_size: int,
        seq_len: int,
        *,
        pieces: Pieces | None = None,
        jitter: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """jitter: the seed of the lengths; None: all are ``seq_len``, but for the last. vocab_size: what the ids of a
        batch must be below, otherwise asking for it raises DataError; None: they are not looked at."""
        self._stream = _Stream(tokens, eos_id, vocab_size)
        self._batch_size, self._seq_len, self._pieces, self._jitter = batch_size, seq_len, pieces, jitter
        self._edges: dict[int, Indices] = {}
        self.num_tokens = len(tokens)
        """Targets per epoch."""
        self._lane_len = -(-self.num_tokens // batch_size)
        self.steps_per_epoch = -(-self._lane_len // seq_len)
        """Batches per epoch."""

    def __getitem__(self, step: int) -> Batch:
        """The batch of any step >= 0; epoch ``step // steps_per_epoch``."""
        epoch, k = epoch_of(step, self.steps_per_epoch)
        starts_B = np.arange(self._batch_size, dtype=np.int64) * self._lane_len
        ends_B = np.minimum(starts_B + self._lane_len, self.num_tokens)
        first, length = k * self._seq_len, self._seq_len
        if self._jitter is not None:
            edges = self._edges_of(epoch, self._jitter)
            first, length = int(edges[k]), int(edges[k + 1] - edges[k])
        order = None if self._pieces is None else self._pieces.of_epoch(epoch)
        return self._stream.batch(starts_B + first, ends_B, length, starts_text=k == 0, order=order)

    def _edges_of(self, epoch: int, seed: int) -> Indices:
        """The edges of an epoch's batches; those of the last epoch asked for are kept."""
        edges = self._edges.get(epoch)
        if edges is None:
            edges = jittered_edges(self._lane_len, self.steps_per_epoch, self._seq_len, seed, epoch)
            self._edges = {epoch: edges}
        return edges


class Windows:
    """Windows of ``seq_len`` tokens in random order, without replacement, for models that start each window anew.

    The first window of an epoch has a random length, so that the edges of all windows move from epoch to epoch; it and
    the last one may be short. The number of windows is the same in every epoch. The order is a keyed permutation, so
    there is nothing to store and nothing to replay.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        eos_id: int,
        batch_size: int,
        seq_len: int,
        seed: int,
        *,
        vocab_size: int | None = None,
    ) -> None:
        """vocab_size: as of ``Lanes``."""
        self._stream = _Stream(tokens, eos_id, vocab_size)
        self._batch_size, self._seq_len, self._seed = batch_size, seq_len, seed
        self.num_tokens = len(tokens)
        """Targets per epoch."""
        # A first window of [r, T] tokens leaves q = ceil(N / T) windows, one of [1, r - 1] tokens q + 1, where r is the
        # length of the last window of a cut without offset. The wider of the two ranges is used.
        q = -(-self.num_tokens // seq_len)
        r = self.num_tokens - (q - 1) * seq_len
        self._first = (r, seq_len) if seq_len - r + 1 >= r - 1 else (1, r - 1)
        self._num_windows = q if self._first[0] == r else q + 1
        self.steps_per_epoch = -(-self._num_windows // batch_size)
        """Batches per epoch."""

    def __getitem__(self, step: int) -> Batch:
        """The batch of any step >= 0; epoch ``step // steps_per_epoch``."""
        epoch, k = epoch_of(step, self.steps_per_epoch)
        low, high = self._first
        first = low + derive_key(self._seed, "order", epoch, "offset") % (high - low + 1)
        permutation = Permutation(self._num_windows, derive_key(self._seed, "order", epoch))
        rows_B = k * self._batch_size + np.arange(self._batch_size, dtype=np.int64)
        filled_B = rows_B < self._num_windows
        windows_B = permutation(np.where(filled_B, rows_B, 0))
        ends_B = np.minimum(first + windows_B * self._seq_len, self.num_tokens)
        starts_B = np.where(windows_B == 0, 0, first + (windows_B - 1) * self._seq_len)
        return self._stream.batch(starts_B, np.where(filled_B, ends_B, 0), self._seq_len, starts_text=True)


class Mixed:
    """The rows of two kinds of batches one below the other: replay of an old corpus beside a new one.

    An epoch is one of the first kind. Where the rows of either begin anew, those of both do.
    """

    def __init__(self, first: Lanes | Windows, second: Lanes | Windows) -> None:
        self._first, self._second = first, second
        self.steps_per_epoch = first.steps_per_epoch
        """Batches per epoch."""

    def __getitem__(self, step: int) -> Batch:
        """The batch of any step >= 0."""
        parts = self._first[step], self._second[step]
        return Batch(
            torch.cat([part.inputs_BT for part in parts]),
            torch.cat([part.targets_BT for part in parts]),
            any(part.starts_text for part in parts),
        )


class Restarted:
    """Batches that begin anew behind ``first_step`` steps, in an order that the run has not had before.

    For a run that goes on with other data: behind ``first_step`` stands the first batch of an epoch, and the numbers of
    the epochs, by which orders and lengths are drawn, begin at ``number`` times ORDER_EPOCHS, so that no two orders of
    a run share one. A batch is thus a function of (seed, number, step - first_step), found in O(1) as before.
    """

    ORDER_EPOCHS = 1 << 20
    """Epochs that each order has to itself."""

    def __init__(self, batches: Batches, *, number: int, first_step: int) -> None:
        """number: which order of the run it is (>= 1; that of its beginning is 0)."""
        self._batches, self._first_step = batches, first_step
        self.steps_per_epoch = batches.steps_per_epoch
        """Batches per epoch."""
        self._shift = number * self.ORDER_EPOCHS * self.steps_per_epoch - first_step

    def __getitem__(self, step: int) -> TrainingBatch:
        """The batch of any step >= ``first_step``. Raises DataError for one before, which was of other data."""
        if step < self._first_step:
            raise DataError(
                f"the batch of step {step + 1} was of other data: the run has had these since step {self._first_step}",
                "bring back what it was trained on before",
            )
        return self._batches[step + self._shift]


class Ahead:
    """The same batches, put together ahead of their use by threads; which thread makes which does not matter.

    Steps are asked for in order; after a jump the batches made in vain are dropped. Leave the ``with`` block to end
    the threads.
    """

    DEPTH = 2
    """Batches per thread that are kept ready."""

    def __init__(self, batches: Batches, workers: int) -> None:
        self.steps_per_epoch = batches.steps_per_epoch
        """Batches per epoch."""
        self._batches = batches
        self._depth = self.DEPTH * workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="batches") if workers else None
        self._ready: dict[int, Future[TrainingBatch]] = {}

    def __getitem__(self, step: int) -> TrainingBatch:
        """The batch of any step >= 0. Raises what making it raised."""
        if self._pool is None:
            return self._batches[step]
        wanted = range(step, step + self._depth + 1)
        for made in [s for s in self._ready if s not in wanted]:
            self._ready.pop(made).cancel()
        for s in wanted:
            if s not in self._ready:
                self._ready[s] = self._pool.submit(self._batches.__getitem__, s)
        return self._ready.pop(step).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class _Stream:
    """Tokens by position, and the token before each."""

    def __init__(self, tokens: NDArray[np.integer], eos_id: int, vocab_size: int | None) -> None:
        if len(tokens) == 0:
            raise DataError("there are no tokens to make batches of", "check the split's text")
        self._tokens, self._eos_id, self._vocab_size = tokens, eos_id, vocab_size

    def batch(
        self,
        starts_B: Indices,
        ends_B: Indices,
        seq_len: int,
        *,
        starts_text: bool,
        order: Callable[[Indices], Indices] | None = None,
    ) -> Batch:
        """Rows of up to ``seq_len`` targets from each start to each end (exclusive), in the order of the text or of
        ``order``, which gives the place in the text of each."""
        positions_BT = starts_B[:, None] + np.arange(seq_len, dtype=np.int64)
        filled_BT = positions_BT < ends_B[:, None]
        positions_BT = np.where(filled_BT, positions_BT, 0)
        if order is not None:
            positions_BT = order(positions_BT)
        targets_BT = np.where(filled_BT, self._read(positions_BT), IGNORE)
        before_BT = self._read(np.maximum(positions_BT - 1, 0))
        inputs_BT = np.where(filled_BT & (positions_BT > 0), before_BT, self._eos_id)
        return Batch(torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT), starts_text)

    def _read(self, positions_BT: Indices) -> Indices:
        """The ids at these positions. Raises DataError for one that is not in the vocabulary."""
        ids_BT = self._tokens[positions_BT].astype(np.int64)
        if self._vocab_size is not None:
            check_ids(ids_BT, self._vocab_size, self._tokens, positions_BT)
        return ids_BT
