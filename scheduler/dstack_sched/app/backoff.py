"""When to try again what failed: at once, then after ever longer waits, and at some point no more."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BackoffSettings:
    """Waits of first_s, doubled after each further try up to last_s. tries: how many, None: without end.

    healthy_after_s: a subject that was well for so long starts anew.
    """

    first_s: float = 0.5
    last_s: float = 30.0
    tries: int | None = None
    healthy_after_s: float = 60.0


@dataclass(slots=True)
class Backoff:
    """The tries on one subject. Times in microseconds, of a monotonic clock."""

    settings: BackoffSettings = field(default_factory=BackoffSettings)
    tries: int = 0
    retry_at_us: int = 0

    @property
    def wait_s(self) -> float:
        """How long to wait after the last try; 0 before the first."""
        if self.tries == 0:
            return 0.0
        doublings = min(self.tries - 1, 62)
        return min(self.settings.last_s, self.settings.first_s * 2.0**doublings)

    @property
    def spent(self) -> bool:
        """Whether no try is left."""
        return self.settings.tries is not None and self.tries >= self.settings.tries

    def due(self, now_us: int) -> bool:
        """Whether to try (again) now."""
        return not self.spent and now_us >= self.retry_at_us

    def tried(self, now_us: int) -> None:
        """A try was made, well or not: should it not last, the next one waits longer."""
        self.tries += 1
        self.retry_at_us = now_us + round(self.wait_s * 1e6)

    def well_since(self, since_us: int, now_us: int) -> None:
        """All is well since then: after a healthy while the tries are forgotten."""
        if self.tries and now_us - since_us >= self.settings.healthy_after_s * 1e6:
            self.tries, self.retry_at_us = 0, 0
