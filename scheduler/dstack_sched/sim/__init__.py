"""Discrete-event simulator: arrivals and a GPU model drive the very same engine."""
