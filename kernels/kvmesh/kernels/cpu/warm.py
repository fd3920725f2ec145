"""Compiles the CPU kernels once, at install time, so that a first start is as fast as a second.

`python -m kvmesh.kernels.cpu.warm`; the machine code is kept in Numba's cache.
"""

from kvmesh.kernels.cpu.step import warm

if __name__ == "__main__":
    warm()
