"""Differential privacy of what a site sends: the settings, and what they guarantee.

Neighbours are two worlds that differ in one site's whole data: in one of them the site has none, and sends a
zero in place of every number. What a site sends is clipped, so the two differ by at most the clip bound, and
noise of ``noise`` times that bound makes each release a Gaussian mechanism. A site makes all its releases
itself and none is drawn at random, so nothing is gained by sampling: k releases are as private as one with
``noise / sqrt(k)``, whose epsilon is known exactly (arXiv 1805.06530).

What this does and does not protect: docs/privacy.md.
"""

from __future__ import annotations

from collections.abc import Collection
from math import inf, sqrt
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedmerge.common.errors import ConfigError

Bound = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Privacy(BaseModel):
    """Clipping and noise.

    Attributes:
        clip: most L2 norm of all numbers that a run has moved, over all layers as if concatenated; of a
            low-rank layer these are the factors.
        noise: standard deviation of the noise on every number, in multiples of the bound; 0 adds none.
        delta: probability that epsilon does not hold.
        input_gram, fisher, second_moment, sketch, residual: the same bound of that kind of statistic, over
            all layers; a statistic without one is not sent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip: Bound
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    input_gram: Bound | None = None
    fisher: Bound | None = None
    second_moment: Bound | None = None
    sketch: Bound | None = None
    residual: Bound | None = None

    def bound(self, statistic: str) -> float:
        """The clip bound of a kind of statistic.

        Raises:
            ConfigError: there is none.
        """
        found: float | None = getattr(self, statistic)
        if found is None:
            raise ConfigError(
                "a statistic that is to be sent has no clip bound",
                got=statistic,
                wanted=f"privacy.{statistic}",
                do="Set it, or choose a rule that does not need this statistic.",
            )
        return found


def releases(messages: int, statistics: Collection[str] = ()) -> int:
    """Gaussian releases of a site: in every message one for the vector and one for each kind of statistic."""
    return messages * (1 + len(set(statistics)))


def epsilon(noise: float, releases: int, delta: float) -> float:
    """The epsilon of a site after so many releases with this noise; infinite without noise.

    Raises:
        ConfigError: the accounting library is not installed.
    """
    if not releases:
        return 0.0
    if not noise:
        return inf
    try:
        from dp_accounting import get_epsilon_gaussian
    except ImportError as error:
        raise ConfigError(
            "epsilon is computed with dp-accounting, which is not installed",
            do="Install it: pip install 'fedmerge[privacy]'.",
        ) from error
    return float(get_epsilon_gaussian(noise / sqrt(releases), delta))
