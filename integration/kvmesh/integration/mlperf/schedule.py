"""LoadGen's arrivals, worked out again: what its Server scenario schedules for a rate and a seed.

LoadGen (mlcommons/inference, loadgen, 6.0) draws gaps by std::exponential_distribution from a
std::mt19937; this does the same with NumPy's generator, so that a simulation has the same arrivals.
"""

import numpy as np
import numpy.typing as npt

# mlperf.conf of rounds 6.0 and 6.1.
QSL_SEED = 2085463073848966840
SAMPLE_SEED = 2747215439041700203
SCHEDULE_SEED = 16159082839903944936


def arrivals(qps: float, count: int, seed: int = SCHEDULE_SEED) -> npt.NDArray[np.float64]:
    """Seconds of `count` arrivals at qps per second on average, ascending, the first at 0.

    Raises ValueError for a rate or a count that is not positive.
    """
    if not qps > 0 or count < 1:
        raise ValueError(f"qps is {qps:g} and count {count}, both must be above 0")
    # RandomState seeds the generator as std::mt19937 does.
    bits = np.random.RandomState(seed & 0xFFFFFFFF)._bit_generator
    words = bits.random_raw(2 * (count - 1)).astype(np.float64)
    # A double of 53 bits takes two words, the low one first.
    uniform = (words[0::2] + words[1::2] * 2.0**32) / 2.0**64
    gaps = -np.log1p(-uniform) / qps
    return np.concatenate([[0.0], np.cumsum(gaps)])
