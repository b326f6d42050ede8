"""The soak's parts: processes sampled by role, growth estimated from the samples."""
