"""Input parsed once, at the edge, into frozen settings; unknown keys are refused."""
