"""The noise of a run as a value: the standard deviation of ln L, and how well it is known.

`fitting.uncertainty` tells it from replicates and residuals. No pandas and no scipy here, because `embedscale recipe`
draws from it and starts without them.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embedscale.values import Count, Value


@dataclass(frozen=True)
class Noise(Value):
    """The standard deviation of ln L of one run about its profile's curve, and how it is known."""

    log_loss: float | None
    source: Literal["pooled", "replicates", "residuals", "given", "none"]
    """"pooled": from replicates and residuals together."""
    degrees_of_freedom: int
    """0 where the noise is given."""
    replicates: float | None = None
    replicates_freedom: Count = 0
    residuals: float | None = None
    residuals_freedom: Count = 0

    @property
    def told(self) -> str:
        """How the noise is known, in words."""
        if self.source in ("given", "none"):
            return self.source
        found = f"{self.source}, {self.degrees_of_freedom} degrees of freedom"
        if self.source == "residuals" and self.replicates is not None:
            found += f"; replicates alone {self.replicates:.2g}, {self.replicates_freedom} degrees of freedom"
        return found

    def draws(self, count: int, rng: np.random.Generator) -> NDArray[np.float64] | None:
        """Return `count` draws of the noise, which its degrees of freedom leave open (scaled inverse χ²), or None."""
        if not self.log_loss:
            return None
        freedom = self.degrees_of_freedom
        if not freedom:  # given
            return np.full(count, self.log_loss)
        return self.log_loss * np.sqrt(freedom / rng.chisquare(freedom, count))
