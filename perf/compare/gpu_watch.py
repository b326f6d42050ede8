"""What the GPU did during a stretch of load: SM activity, occupancy, memory bandwidth, energy, GPU% granted.

SM activity is NVML's GPM counter on Hopper (share of cycles with a warp on an SM, over all SMs); the coarse
"utilization.gpu" is 100% as soon as any kernel runs. Energy is NVML's counter for the whole board. All is
read at the two ends of the stretch: within it the machine is left alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

GPM = {
    "sm_activity": "NVML_GPM_METRIC_SM_UTIL",
    "sm_occupancy": "NVML_GPM_METRIC_SM_OCCUPANCY",
    "dram_bandwidth": "NVML_GPM_METRIC_DRAM_BW_UTIL",
}


class Nvml:
    """One GPU's counters. Every reading may be None: then this driver or GPU has it not."""

    def __init__(self, index: int = 0) -> None:
        self._nvml: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByIndex(index)
            self._nvml = pynvml
        except Exception:  # no NVML, no driver, no GPU: nothing to watch
            return

    def name(self) -> str | None:
        return self._read(lambda nvml: str(nvml.nvmlDeviceGetName(self._device)))

    def driver(self) -> str | None:
        return self._read(lambda nvml: str(nvml.nvmlSystemGetDriverVersion()))

    def energy_mj(self) -> int | None:
        return self._read(lambda nvml: int(nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)))

    def free_bytes(self) -> int | None:
        return self._read(lambda nvml: int(nvml.nvmlDeviceGetMemoryInfo(self._device).free))

    def sm_clock_mhz(self) -> int | None:
        return self._read(lambda nvml: int(nvml.nvmlDeviceGetClockInfo(self._device, nvml.NVML_CLOCK_SM)))

    def sample(self) -> Any:
        """A GPM sample, for `gpm`."""

        def take(nvml: Any) -> Any:
            sample = nvml.nvmlGpmSampleAlloc()
            nvml.nvmlGpmSampleGet(self._device, sample)
            return sample

        return self._read(take)

    def gpm(self, before: Any, after: Any) -> dict[str, float]:
        """Means between two samples; {} where there are none."""
        if before is None or after is None:
            return {}

        def compare(nvml: Any) -> dict[str, float]:
            query = nvml.c_nvmlGpmMetricsGet_t()
            query.version = nvml.NVML_GPM_METRICS_GET_VERSION
            query.sample1, query.sample2 = before, after
            query.numMetrics = len(GPM)
            for place, metric in enumerate(GPM.values()):
                query.metrics[place].metricId = getattr(nvml, metric)
            nvml.nvmlGpmMetricsGet(query)
            return {
                name: query.metrics[place].value / 100.0
                for place, name in enumerate(GPM)
                if query.metrics[place].nvmlReturn == nvml.NVML_SUCCESS
            }

        return self._read(compare) or {}

    def _read(self, read: Callable[[Any], Any]) -> Any:
        if self._nvml is None:
            return None
        try:
            return read(self._nvml)
        except Exception:  # not supported here: pynvml has several errors for it, ctypes some more
            return None


class GpuWatch(threading.Thread):
    """Watches a stretch that begins `delay_s` after `start`; `figures` holds what was seen, after `join`.

    granted: total GPU%-ms that the arbiter has granted so far; None: nobody grants. at_end: called when the
    stretch ends (in this thread), for whatever else is to be read then.
    """

    def __init__(
        self,
        nvml: Nvml,
        delay_s: float,
        seconds: float,
        *,
        granted: Callable[[], float] | None = None,
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name="gpu-watch", daemon=True)
        self.figures: dict[str, float] = {}
        self.window_s = (0.0, 0.0)  # the stretch, wall-clock
        self._nvml, self._delay_s, self._seconds = nvml, delay_s, seconds
        self._granted, self._at_end = granted, at_end

    def run(self) -> None:
        nvml = self._nvml
        time.sleep(self._delay_s)
        began_s = time.time()
        started_s, energy_mj, sample = time.monotonic(), nvml.energy_mj(), nvml.sample()
        granted = self._granted() if self._granted else None
        time.sleep(self._seconds)
        seconds = time.monotonic() - started_s
        self.window_s = (began_s, time.time())
        found = self.figures
        found["seconds"] = seconds
        found |= nvml.gpm(sample, nvml.sample())
        after_mj = nvml.energy_mj()
        if energy_mj is not None and after_mj is not None:
            found["energy_j"] = (after_mj - energy_mj) / 1e3
            found["power_w"] = found["energy_j"] / seconds
        clock_mhz = nvml.sm_clock_mhz()
        if clock_mhz is not None:
            found["sm_clock_mhz"] = float(clock_mhz)
        if granted is not None and self._granted is not None:
            found["granted_percent"] = (self._granted() - granted) / (1e3 * seconds)
        self._at_end()
