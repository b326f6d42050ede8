"""Use cases over ports: profile, plan, apply, control loop, arbiter service."""
