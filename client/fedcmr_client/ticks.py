"""Public ticks: replies leave at times that say nothing about how long the work took."""

from __future__ import annotations

import math
import time

from fedcmr_shared.errors import ConfigurationError


def next_tick(now_s: float, tick_s: float) -> float:
    """Return the first multiple of ``tick_s`` seconds since 1970 that is not before ``now_s``.

    Raises:
        ConfigurationError: ``tick_s`` is not positive and finite.
    """
    if not (math.isfinite(tick_s) and tick_s > 0):
        raise ConfigurationError(f"the tick is {tick_s} s: it must be positive and finite")
    count = math.ceil(now_s / tick_s)
    # The quotient of two floats can round across a whole number.
    if count * tick_s < now_s:
        count += 1
    elif (count - 1) * tick_s >= now_s:
        count -= 1
    return count * tick_s


def hold_until_tick(tick_s: float) -> float:
    """Wait for the next tick and return its time in seconds since 1970.

    The wait is at most one tick, also when the clock is set meanwhile.

    Raises:
        ConfigurationError: ``tick_s`` is not positive and finite.
    """
    now = time.time()
    tick = next_tick(now, tick_s)
    time.sleep(tick - now)
    return tick
