"""Triton, NVML, MPS, files, sockets, processes. Adapters translate and never decide."""
