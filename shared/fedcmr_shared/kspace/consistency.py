"""Data consistency: how a prediction is brought back to the measured samples."""

from __future__ import annotations

from torch import Tensor


def weighted_data_consistency(
    prediction: Tensor, measured: Tensor, mask: Tensor, weight: Tensor
) -> Tensor:
    """Return the weighted mean ``(y + |w| m) / (1 + |w|)`` where measured, ``m`` elsewhere.

    This is the exact minimiser of ``|k - y|² + |w| |k - m|²`` over the measured samples, as in
    CardioMM (arXiv 2512.21652). Weight 0 keeps the measured samples; a large weight keeps the
    prediction.

    Args:
        prediction: k-space ``m`` of the network, complex ``[batch, coil, phase, readout]``.
        measured: measured k-space ``y``, of the same shape.
        mask: measured positions, bool or 0/1, broadcastable to ``prediction``.
        weight: real scalar ``w``.
    """
    # As a correction: one complex product, and unmeasured samples stay untouched.
    return prediction - mask / (1 + weight.abs()) * (prediction - measured)


def soft_data_consistency(
    prediction: Tensor, measured: Tensor, mask: Tensor, step: Tensor
) -> Tensor:
    """Return the gradient step ``m - step · mask · (m - y)`` of the end-to-end VarNet.

    Source: Sriram et al. 2020 (arXiv 2004.06688), equation 7. Arguments as in
    :func:`weighted_data_consistency`; step 1 puts the measured samples back.
    """
    return prediction - step * mask * (prediction - measured)
