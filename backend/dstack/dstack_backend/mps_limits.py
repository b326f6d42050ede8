"""What MPS bounds in this process: set in its environment, fixed once the CUDA context is made."""

from __future__ import annotations

import os

MPS_MEMORY = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"


def limit_memory(device_id: int, limit_bytes: int) -> None:
    """Bound the device memory that this process can take, whole MiB, its CUDA context included.

    device_id: as this process counts its devices. An allocation beyond the bound fails as if the device were
    full; other processes keep their memory. A limit that is in the environment already, for all devices
    ("0=4G,1=4G"), keeps those of the other devices; the smaller one of this device's counts for the driver.
    """
    limits = dict(
        entry.strip().partition("=")[::2]
        for entry in os.environ.get(MPS_MEMORY, "").split(",")
        if "=" in entry
    )
    limits[str(device_id)] = f"{max(1, limit_bytes >> 20)}M"
    os.environ[MPS_MEMORY] = ",".join(f"{device}={limit}" for device, limit in sorted(limits.items()))
