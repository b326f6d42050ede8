"""Alternative (g): all models in one stub process, a thread and a stream each."""
