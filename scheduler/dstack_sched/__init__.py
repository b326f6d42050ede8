"""D-STACK's controller and arbiter: profile, plan, apply, schedule."""

__version__ = "0.1.0"
