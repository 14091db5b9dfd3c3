"""Time 4,000 bootstrap refits of the joint law, next to a plain loop over scipy.

    python tests/benchmarks/bootstrap.py RUNS.csv [refits] [scipy refits]

RUNS.csv holds the published Chinchilla runs (columns N, D, loss). The five largest losses are dropped, as published.
The loop is what most replications run: L-BFGS-B on the same Huber objective, one resample after another, started at
the full fit, with numerical and with analytic gradients. It is timed on part of the resamples and scaled up.
"""

import os
import sys
import time

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from analysis.fitting.laws import CHINCHILLA
from analysis.fitting.solver import fit_joint
from analysis.fitting.uncertainty import resampled

DELTA = 1e-3


def main(path: str, refits: int = 4000, looped: int = 100) -> None:
    runs = pd.read_csv(path)
    runs = runs[runs["loss"] < np.sort(runs["loss"])[-5]]
    n, d, loss = (runs[name].to_numpy() for name in ("N", "D", "loss"))
    print(f"{len(runs)} runs, {len(os.sched_getaffinity(0))} cores, numpy {np.__version__}")

    began = time.perf_counter()
    fit = fit_joint(CHINCHILLA, n, d, loss, delta=DELTA)
    print(f"first fit, {fit.starts} starts of which {fit.agreeing} agree: {time.perf_counter() - began:.2f} s")
    began = time.perf_counter()
    draws = resampled(fit, list(loss[:, None]), refits, np.random.default_rng(0))
    ours = time.perf_counter() - began
    print(f"batched: {refits} refits in {ours:.2f} s")
    for name, low, high in zip(CHINCHILLA.coefficients, *np.percentile(draws, [2.5, 97.5], axis=0), strict=True):
        print(f"  {name:6} {low:.5g} … {high:.5g}")

    weights = np.random.default_rng(0).multinomial(len(loss), np.full(len(loss), 1 / len(loss)), refits)
    x, y, target = fit.data.log_n, fit.data.log_d, np.log(loss)

    def huber(theta, w, with_gradient):
        e, a, b, alpha, beta = theta
        terms = np.exp([np.full_like(x, e), a - alpha * x, b - beta * y])
        total = terms.sum(0)
        residual = np.log(total) - target
        size = np.abs(residual)
        # Scaled by 1e3, because L-BFGS-B stops early if the objective is small.
        value = 1e3 * (w * np.where(size < DELTA, size**2 / 2, DELTA * (size - DELTA / 2))).sum()
        if not with_gradient:
            return value
        share = terms / total * (1e3 * w * np.clip(residual, -DELTA, DELTA))
        slopes = [share[0], share[1], share[2], -share[1] * x, -share[2] * y]
        return value, np.array([slope.sum() for slope in slopes])

    # The same resamples as above.
    for with_gradient in (False, True):
        began = time.perf_counter()
        higher = []
        for w, found in zip(weights[:looped], draws, strict=False):
            answer = minimize(huber, fit.theta, (w, with_gradient), "L-BFGS-B", jac=with_gradient)
            mine = huber(CHINCHILLA.internal(found[None], fit.data)[0], w, False)
            higher.append(answer.fun / mine - 1)
        took = time.perf_counter() - began
        kind = "analytic" if with_gradient else "numerical"
        whole = took * refits / looped
        print(
            f"scipy L-BFGS-B, {kind} gradients: {looped} refits in {took:.2f} s, so {refits} in {whole:.0f} s, "
            f"{whole / ours:.0f} times ours; its objective is higher by {np.median(higher):.1e} (median), "
            f"{np.max(higher):.1e} (most)"
        )


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    main(sys.argv[1], *map(int, sys.argv[2:]))
