"""What the GPU did while a stretch of load ran: SM activity, occupancy, memory bandwidth, energy.

SM activity is NVML's GPM counter on Hopper (share of cycles with a warp on an SM, over all SMs): the coarse
"utilization.gpu" is 100% as soon as any kernel runs.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any


class GpuWatch:
    """A context manager around a stretch; afterwards `figures` holds means over it. {}: no GPU."""

    def __init__(self, index: int = 0) -> None:
        self.figures: dict[str, float] = {}
        self._index = index
        self._nvml: Any = None

    def __enter__(self) -> GpuWatch:
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._device = pynvml.nvmlDeviceGetHandleByIndex(self._index)
        except Exception:  # no NVML, no driver, no GPU: nothing to watch
            self._nvml = None
            return self
        self._before = self._sample()
        self._energy_mj = self._energy()
        self._start_s = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._nvml is None:
            return
        seconds = time.monotonic() - self._start_s
        energy_mj = self._energy()
        if energy_mj is not None and self._energy_mj is not None:
            self.figures["energy_j"] = (energy_mj - self._energy_mj) / 1e3
            self.figures["power_w"] = self.figures["energy_j"] / seconds
        self.figures["seconds"] = seconds
        after = self._sample()
        if self._before is not None and after is not None:
            self.figures |= self._metrics(self._before, after)
        self._nvml.nvmlShutdown()

    def _energy(self) -> int | None:
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device))
        except self._nvml.NVMLError:
            return None

    def _sample(self) -> Any:
        try:
            sample = self._nvml.nvmlGpmSampleAlloc()
            self._nvml.nvmlGpmSampleGet(self._device, sample)
        except (self._nvml.NVMLError, AttributeError):
            return None
        return sample

    def _metrics(self, before: Any, after: Any) -> dict[str, float]:
        nvml = self._nvml
        wanted = {
            "sm_activity": nvml.NVML_GPM_METRIC_SM_UTIL,
            "sm_occupancy": nvml.NVML_GPM_METRIC_SM_OCCUPANCY,
            "dram_bandwidth": nvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
        }
        query = nvml.c_nvmlGpmMetricsGet_t()
        query.version = nvml.NVML_GPM_METRICS_GET_VERSION
        query.sample1, query.sample2 = before, after
        query.numMetrics = len(wanted)
        for place, metric in enumerate(wanted.values()):
            query.metrics[place].metricId = metric
        try:
            nvml.nvmlGpmMetricsGet(query)
        except nvml.NVMLError:
            return {}
        return {
            name: query.metrics[place].value / 100.0
            for place, name in enumerate(wanted)
            if query.metrics[place].nvmlReturn == nvml.NVML_SUCCESS
        }
