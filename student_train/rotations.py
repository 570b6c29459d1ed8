"""Rotations that give every channel of decorrelated features the same variance.

Features whose covariance is diagonal have channels of very different sizes. Turned by
a Hadamard matrix, whose entries are all +-1/sqrt(D), each channel becomes an even
mixture of all, with the mean of their variances, whatever those are. Where no Hadamard
matrix of the size is known here, plane rotations chosen for the variances do the same.

Everything here is float64 and a pure function of its arguments.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

_SYLVESTER = np.array([[1.0, 1.0], [1.0, -1.0]])


def equalising_rotation(variances: npt.NDArray[np.float64]) -> Matrix:
    """Returns an orthogonal R with ``diag(R diag(variances) R^T)`` constant: (D, D).

    A Hadamard matrix where there is one, for any variances alike; else rotations for
    these variances.

    Args:
        variances: (D,), not negative.
    """
    num_channels = len(variances)
    found = hadamard(num_channels)
    if found is not None:
        rotation: Matrix = found / np.sqrt(num_channels)
        return rotation
    return plane_rotations(variances)


def hadamard(order: int) -> Matrix | None:
    """Returns a Hadamard matrix, entries +-1 and rows orthogonal: (order, order).

    Sylvester's doubling of the smallest core that Paley's constructions over a prime
    give: all widths of common encoders, such as 192, 384, 768, 1024, 1152, 1280, 1408,
    1536 and 4096. None for other orders, also for some that have one.

    Args:
        order: at least 1.

    Source: Sylvester 1867; Paley, "On orthogonal matrices" (1933), lemmas 2 and 3.
    """
    doublings = (order & -order).bit_length() - 1
    for power in range(doublings, -1, -1):
        core = _core(order >> power)
        if core is not None:
            for _ in range(power):
                core = np.kron(_SYLVESTER, core)
            return core
    return None


def _core(order: int) -> Matrix | None:
    """Returns a Hadamard matrix of order 1, or one of Paley's; None for others."""
    if order == 1:
        return np.ones((1, 1))
    if order % 4:
        return None
    if _is_prime(order - 1):
        # q = order - 1 is 3 modulo 4: the Jacobsthal matrix is skew.
        skew = _bordered(order - 1, -1.0)
        return skew + np.eye(order)
    half = order // 2
    if half % 4 == 2 and _is_prime(half - 1):
        conference = _bordered(half - 1, 1.0)
        off = np.array([[1.0, -1.0], [-1.0, -1.0]])
        return np.kron(conference, _SYLVESTER) + np.kron(np.eye(half), off)
    return None


def _bordered(prime: int, sign: float) -> Matrix:
    """Returns Paley's conference matrix: 0 on the diagonal, +-1 elsewhere."""
    squares = {number * number % prime for number in range(1, prime)}
    character = np.array(
        [0.0] + [1.0 if number in squares else -1.0 for number in range(1, prime)]
    )
    numbers = np.arange(prime)
    found = np.zeros((prime + 1, prime + 1))
    found[0, 1:], found[1:, 0] = 1.0, sign
    found[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % one for one in range(2, int(number**0.5) + 1))


def plane_rotations(variances: npt.NDArray[np.float64]) -> Matrix:
    """Returns an orthogonal R with ``diag(R diag(variances) R^T)`` constant: (D, D).

    At most D - 1 rotations, each in the plane of the channels of least and of most
    variance, after which one of the two has the mean.

    Args:
        variances: (D,), not negative.

    Source: Bendel and Mickey, "Population correlation matrices for sampling
        experiments" (1978); Davies and Higham, "Numerically stable generation of
        correlation matrices and their factors" (2000), section 3.
    """
    num_channels = len(variances)
    covariance, rotation = np.diag(variances.astype(np.float64)), np.eye(num_channels)
    mean = float(variances.mean())
    is_open = np.ones(num_channels, bool)
    for _ in range(num_channels - 1):
        diagonal = covariance.diagonal()
        low = int(np.where(is_open, diagonal, np.inf).argmin())
        high = int(np.where(is_open, diagonal, -np.inf).argmax())
        below, above = diagonal[low] - mean, diagonal[high] - mean
        if not below < 0 < above:
            break
        shared = covariance[low, high]
        root = np.sqrt(shared * shared - below * above)
        tangent = (shared + np.copysign(root, shared)) / above
        cosine = 1 / np.sqrt(1 + tangent * tangent)
        turn = cosine * np.array([[1.0, -tangent], [tangent, 1.0]])
        both = [low, high]
        covariance[both] = turn @ covariance[both]
        covariance[:, both] = covariance[:, both] @ turn.T
        rotation[both] = turn @ rotation[both]
        is_open[low] = False
    return rotation
