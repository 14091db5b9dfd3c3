"""Starting points of a joint law: every basin of its least squares on a grid of exponents.

For given exponents a law is linear in its other coefficients. So its least squares, and these coefficients, are known
at each point of the grid (variable projection, Golub and Pereyra 1973). A point that is lower than all of its
neighbours stands for one basin: a few starts find what hundreds would find. The price is that a basin narrower than the
grid is missed; Huber's ρ has such basins, for which `newton` shakes the weights.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Exponents of a grid. Those above 1.5 and below 0 fit a wild run or two: such a minimum may be the lowest one, and then
# it is found. A law whose exponent is below 0 is refused.
EXPONENTS = np.array([-12, -5, -3, -2, -1, -0.5, *np.geomspace(0.03, 1.5, 12), 3, 6, 12])
TURNED = np.sort(np.append(EXPONENTS, [-0.3, -0.2, -0.08, -0.02]))  # of a law whose terms may have either sign
USUAL = 0.3  # exponent of most laws
SAME = 1e-6  # relative difference of squares up to which two points of the grid are one start: a plateau


def basins(
    terms: Callable[..., Array], axes: Sequence[Array], loss: Array, positive: Sequence[int] = ()
) -> tuple[Array, Array]:
    """Return the exponents [axes, starts] and the other coefficients [starts, k] of each basin, the lowest first.

    `terms` returns the terms [m, points, k] of the loss for exponents, each [m]. Coefficients in `positive` are at
    least 0.
    """
    mesh = np.meshgrid(*axes, indexing="ij")
    exponents = np.array([axis.ravel() for axis in mesh])
    linear, squares = projected(terms(*exponents), loss, positive)
    around = np.pad(squares.reshape(mesh[0].shape), 1, constant_values=np.inf)
    window = sliding_window_view(around, (3,) * len(axes))
    lowest = window.min(tuple(range(-len(axes), 0))).ravel()
    found = np.flatnonzero(squares <= lowest * (1 + SAME))
    # Of a plateau, where the loss does not depend on an exponent, the most usual exponent is the start.
    unusual = np.abs(exponents[:, found] - USUAL).sum(0)
    level = np.round(np.log(np.maximum(squares[found], 1e-300)) / SAME)
    found = found[np.lexsort((unusual, level))]
    value = squares[found]
    found = found[np.append(True, value[1:] > value[:-1] * (1 + 3 * SAME))]
    return exponents[:, found], linear[found]


def projected(design: Array, loss: Array, positive: Sequence[int] = ()) -> tuple[Array, Array]:
    """Return the linear coefficients [m, k] and the squares of the relative residuals [m] of designs [m, points, k].

    Coefficients in `positive` are at least 0: each set of them that may be 0 is tried.
    """
    scaled = design / loss[:, None]
    gram, right = scaled.transpose(0, 2, 1) @ scaled, scaled.sum(1)
    m, _, k = design.shape
    best, values = np.full(m, np.inf), np.zeros((m, k))
    for zero in (some for count in range(len(positive) + 1) for some in combinations(positive, count)):
        kept = [i for i in range(k) if i not in zero]
        part = gram[:, kept][:, :, kept]
        ridge = 1e-12 * np.trace(part, axis1=1, axis2=2)[:, None, None] * np.eye(len(kept))
        tried = np.zeros((m, k))
        if kept:
            tried[:, kept] = np.linalg.solve(part + ridge, right[:, kept, None])[..., 0]
        squares = np.square((scaled @ tried[..., None])[..., 0] - 1).sum(1)
        better = (tried[:, list(positive)] >= 0).all(1) & (squares < best)
        best[better], values[better] = squares[better], tried[better]
    return values, best
