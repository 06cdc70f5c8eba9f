"""Operators of multi-coil k-space: Fourier transform, coils, sampling masks, consistency."""
