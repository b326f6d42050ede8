"""What a loaded model offers, on whatever device: one call, or two phases that overlap with other batches.

(scores,) = session.run({"image": images}, ["scores"])

staged = session.stage({"image": images})       # host -> device, while another batch computes
running = session.launch(staged, ["scores"])    # in the device thread
running.wait()                                  # the device is free for the next launch
(scores,) = running.outputs()                   # the copy out is done; any thread
running.close()                                 # the memory is free for another batch
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dstack_backend.tensors import Array, DeviceArray, Feed, TensorSpec


class Staged(Protocol):
    """A batch on the device (or on its way there), waiting for launch()."""

    rows: int  # 1: of fixed shape; 0: without any dimension

    def close(self) -> None:
        """Give it up without a launch."""
        ...


class Running(Protocol):
    """A batch that was launched."""

    gpu_percent: float
    """The share it runs at."""
    sm_groups: int
    """The SM groups it runs on; 0: not chosen."""

    @property
    def times_us(self) -> Mapping[str, int]:
        """Device time of its stages copy_in, run, copy_out, once outputs() has returned; where not every
        batch is timed, that of one before it.
        """
        ...

    def wait(self) -> None:
        """Until it has computed. Raises RunError, DeviceLostError."""
        ...

    def outputs(self) -> list[Array]:
        """The outputs asked for, in that order, once they are in host memory. Good until close().

        Any thread, also before wait(). Raises as wait() does.
        """
        ...

    def device_outputs(self) -> list[DeviceArray]:
        """The outputs asked for on the device, complete once wait() has returned. Good until close()."""
        ...

    def close(self) -> None:
        """Nobody reads its outputs any more. Twice is once."""
        ...


class Session(Protocol):
    """A loaded model.

    Every call in any thread; launches are to be made one after the other. A batch may be launched before the
    one ahead of it has computed: it runs behind it. A few batches may be between stage() and close(); stage()
    waits for one to be closed where there are more.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    takes_parts: bool
    """Whether stage() likes the rows of a batch where they are, in parts, better than gathered."""

    @property
    def levels(self) -> tuple[float, ...]:
        """GPU% that a run can name, rising; empty: the share is fixed when the process starts."""
        ...

    @property
    def groups(self) -> int:
        """SM groups that sm_groups can name, one a bit from bit 0 on; 0: none."""
        ...

    @property
    def device_bytes(self) -> int:
        """Device memory that the session holds; 0 on the CPU."""
        ...

    @property
    def graphs(self) -> int:
        """Batch sizes that run as a CUDA graph."""
        ...

    @property
    def preparing(self) -> int:
        """Programs (a batch size on a share of the device) still to be made, while others serve."""
        ...

    def rows_at_once(self, rows: int) -> int:
        """How many of so many waiting rows had better run as one batch, 1 at least: those that it is prepared
        for. It is prepared for more behind the scenes, where more are asked about."""
        ...

    def stage(self, feeds: Mapping[str, Feed]) -> Staged:
        """Bring inputs to the device, from host or device memory, which must stay as it is until the batch
        has run. Rows of all inputs agree. Raises RunError, DeviceLostError."""
        ...

    def launch(
        self,
        staged: Staged,
        outputs: Sequence[str] | None = None,
        *,
        device_outputs: Sequence[str] = (),
        gpu_percent: float | None = None,
        sm_groups: int = 0,
    ) -> Running:
        """Start a staged batch; `staged` is used up, also by an error.

        outputs: names to bring to host memory (all, in graph order, for None). device_outputs: names to leave
        on the device (none on the CPU). gpu_percent: run at the nearest level; None: at the one set at load.
        sm_groups: wanted SM groups, which say the level too. Groups that are not prepared yet are prepared
        behind the scenes, meanwhile the prepared ones nearest to them are taken: Running tells. Both are
        ignored where the share is fixed. Raises RunError, DeviceLostError.
        """
        ...

    def run(
        self,
        feeds: Mapping[str, Feed],
        outputs: Sequence[str] | None = None,
        *,
        gpu_percent: float | None = None,
        sm_groups: int = 0,
    ) -> list[Array]:
        """stage, launch and wait in a row. The arrays returned are the caller's own."""
        ...

    def warm_up(self, batch_sizes: Sequence[int], within_s: float = math.inf) -> None:
        """Prepare the device for these batch sizes; others are padded up to the next one of them.

        within_s: where the smallest and the largest have taken longer, those between follow in the
        background, and batches are padded up further until then.
        """
        ...

    def forget(self) -> None:
        """Give back what warming up and runs keep by batch size; it is made again when needed."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Memory to gather inputs in that stage() takes fastest. Good until close()."""
        ...

    def check(self) -> None:
        """Raise DeviceLostError where nothing can run any more. Any thread; disturbs nothing."""
        ...

    def close(self) -> None: ...


def ladder(batch_size: int) -> tuple[int, ...]:
    """The batch sizes worth preparing for batches up to batch_size: powers of two, and itself. A batch is
    padded by less than as much again, and the memory of all is about twice that of the largest.
    """
    powers = (1 << exponent for exponent in range(batch_size.bit_length()))
    return tuple(sorted({*(power for power in powers if power <= batch_size), batch_size}))


class TwoPhases:
    """run() for a session that has stage() and launch()."""

    def run(
        self: Session,
        feeds: Mapping[str, Feed],
        outputs: Sequence[str] | None = None,
        *,
        gpu_percent: float | None = None,
        sm_groups: int = 0,
    ) -> list[Array]:
        staged = self.stage(feeds)
        running = self.launch(staged, outputs, gpu_percent=gpu_percent, sm_groups=sm_groups)
        try:
            running.wait()
            return [array.copy() for array in running.outputs()]
        finally:
            running.close()
