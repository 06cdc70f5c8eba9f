"""Noise that several sites make together: integers in, one integer sum out.

With secure aggregation only a sum over at least m sites is opened. When at most c of them work
with the coordinator, each site may add a share of variance (z L)² / (m - c) to its integers: the
others' shares add up to a noise multiplier of z or more, while each site alone has less than it
needs. What is opened is as private as with Gaussian noise of multiplier z, by these steps:

1. *Sensitivity.* A patient's clipped gradient is rounded to a vector of whole numbers of norm at
   most L (:meth:`fedcmr_shared.privacy.mechanism.Mechanism.grid_scale`). The site's sum is limited
   to a public range, value by value, which brings two sums no further apart.
2. *Shares.* They are discrete Gaussian. By Kairouz, Liu and Steinke (arXiv 2102.06387, theorem on
   sums) the logarithm of the probability of any sum of n shares of variance s² differs from that of
   the discrete Gaussian of variance n s² by at most 10 Σ exp(-2 π² s² k / (k + 1)) over k from 1
   to n - 1: below 10^-1000 for s >= 16, which is required. A share ends at 16 s, which is true of
   each value but with a probability below 10^-55.
3. *Divergence.* For the discrete Gaussian of variance V shifted by whole numbers of norm at most
   L, the Rényi divergence at order a is at most a L² / 2V, as for the Gaussian (Canonne, Kamath
   and Steinke, arXiv 2004.00010).
4. *Sampling.* The noise is symmetric, so that the divergence of a mixture (patient drawn with
   probability q) from its component without the patient is at least the reverse one (Mironov,
   Talwar and Zhang, arXiv 1908.10530, theorem 5). At integer orders it is the binomial sum of
   :mod:`fedcmr_shared.privacy.accounting`, whose moments step 3 bounds.
5. *Transport.* Sums modulo 2^b of words are computed from the integer sum alone.

No rotation of the vectors is needed: it serves to spread large values when words are short, while
here the words hold the largest value that a site can send, at a grid much finer than the noise.
Nor is rounding random: it would save values below half a grid step from vanishing, while the noise
of the sum has z L grid steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy.discrete_noise import discrete_gaussian, reach
from fedcmr_shared.privacy.mechanism import ClippedSum, Mechanism
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.privacy import NoiseShares, PrivacySpec

_EXACT: Final = 2**53


@dataclass(frozen=True)
class NoiseShare:
    """What a site does to its sum of integers: public numbers only.

    ``variance`` is that of its share of the noise in squared grid steps. Each value of the sum is
    limited to plus or minus ``limit`` before; with the noise it never exceeds ``bound``.

    Raises:
        ConfigurationError: values beyond 2^53 are possible, or the share is out of range.
    """

    variance: float
    limit: int

    def __post_init__(self) -> None:
        if self.bound >= _EXACT:
            raise ConfigurationError(
                f"values of distributed noise may reach {self.bound:.3g}: lower distributed.levels"
            )

    @property
    def bound(self) -> int:
        """Largest absolute value that leaves a site, never exceeded."""
        return self.limit + reach(self.variance)


def noise_share(job: JobSpec) -> NoiseShare:
    """Return the share of each site of ``job``.

    A sum reaches the limit only when its mean over the expected patients exceeds the clip norm in a
    single value; a site with more patients than declared loses the rest, not its privacy.

    Raises:
        ConfigurationError: the job's noise is not distributed, or its numbers are out of range.
    """
    privacy, shares = _shared(job)
    patients = math.ceil(Mechanism.of(privacy, 1).expected_patients)
    return NoiseShare(shares.variance(privacy.noise_multiplier), shares.levels * patients)


def noisy_integers(total: ClippedSum, share: NoiseShare) -> Tensor:
    """Return a sum of contributions with levels and the site's share of noise, as float64.

    All values are whole. Every call draws new noise; a sum must be released once only.
    """
    noise = torch.from_numpy(discrete_gaussian(total.vector.numel(), share.variance))
    return total.vector.clamp(-share.limit, share.limit).add_(noise.to(total.vector))


def mean_update(
    job: JobSpec, number: int, sums: Mapping[str, Tensor], sites: int
) -> dict[str, Tensor]:
    """Return what one SGD step along the mean gradient of round ``number`` changes, in float64.

    ``sums`` are the opened integer sums over ``sites`` sites, by name of parameter.

    Raises:
        ConfigurationError: the job's noise is not distributed.
    """
    privacy, _ = _shared(job)
    public = Mechanism.of(privacy, 1)
    scale = public.grid_scale(sum(tensor.numel() for tensor in sums.values()))
    rate = job.learning_rate(number - 1)
    factor = -rate / (scale * sites * public.expected_patients)
    return {name: tensor.double() * factor for name, tensor in sums.items()}


def _shared(job: JobSpec) -> tuple[PrivacySpec, NoiseShares]:
    privacy = job.privacy
    shares = None if privacy is None else privacy.noise_shares(job.minimum_sites)
    if privacy is None or shares is None:
        raise ConfigurationError(f"job {job.name} has no privacy.distributed: set it, or add noise")
    return privacy, shares
