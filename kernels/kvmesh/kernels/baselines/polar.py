"""PolarQuant (arXiv 2502.02617). For comparison only, never for serving."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.baselines.turboquant import haar, half

Vectors = npt.NDArray[np.float64]
_BLOCK = 16
_FIRST_BITS = 4
_BOOKS = (  # the optimal 2-bit angles of levels 2, 3 and 4, rad
    (0.3100, 0.6345, 0.9370, 1.2615),
    (0.4250, 0.6721, 0.8939, 1.1426),
    (0.5251, 0.7073, 0.8654, 1.0468),
)


def _nearest(angle: Vectors, book: tuple[float, ...]) -> Vectors:
    levels = np.array(book)
    return np.asarray(levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, angle)])


@dataclass(frozen=True, slots=True)
class PolarQuant:
    """Blocks of 16 as one radius and four levels of angles: 4 bits, then 2 each."""

    seed: int = 1

    def bits_per_element(self, dim: int) -> float:
        return (8 * _FIRST_BITS + (4 + 2 + 1) * 2 + 16) / _BLOCK

    def quantize_dequantize(self, x: Vectors) -> Vectors:
        rotation = haar(x.shape[1], self.seed)
        radius = (x @ rotation.T).reshape(len(x), -1, _BLOCK)
        step = 2 * np.pi / (1 << _FIRST_BITS)
        angles: list[Vectors] = []
        for level in range(4):
            even, odd = radius[..., 0::2], radius[..., 1::2]
            angle = np.arctan2(odd, even)
            if level == 0:
                angles.append((np.floor(angle / step) + 0.5) * step)
            else:
                angles.append(_nearest(angle, _BOOKS[level - 1]))
            radius = np.hypot(even, odd)
        back = half(radius)
        for angle in reversed(angles):
            parts = np.stack((back * np.cos(angle), back * np.sin(angle)), axis=-1)
            back = parts.reshape(len(x), parts.shape[1], -1)
        return np.asarray(back.reshape(x.shape) @ rotation)
