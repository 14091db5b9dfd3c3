"""How often the rules for the state of an optimum err, on profiles of known laws.

    python tests/benchmarks/states.py [profiles]

Each case is a grid of sizes, a noise of ln L and perhaps a fault. For each of its profiles (default: 400), noise is
drawn and a parabola is fitted. An optimum is good if its size is within a factor 2 of the truth and its loss is less
than 2 %, or three deviations of the noise, too low. Only profiles whose best size lies between two others count.
"refused" is the share of good optima that get another state than "interior"; "passed" is the share of bad ones that
stay "interior".
"""

import sys
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from analysis.fitting import optima
from analysis.fitting.laws import CHINCHILLA
from embedscale.run.families import PYTHIA

Array = np.ndarray
LAWS = [(0.1, 900.0, 90.0, 0.45, 0.25), (0.3, 900.0, 900.0, 0.45, 0.35), (1.82, 482.0, 2085.0, 0.348, 0.366)]
PAPER = np.array([row.parameters for row in PYTHIA.sizes.values() if row.parameters < 3e9], float)
TRIO = np.array([1 / 3.9, 1, 3.3])  # the quickstart's sizes
Profile = tuple[tuple[float, ...], float, Array]  # law, budget, sizes


def best(law: tuple[float, ...], budget: float) -> float:
    """Return N* where a token costs 6 N (Hoffmann et al. 2022, equation 4)."""
    _, a, b, alpha, beta = law
    return (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (budget / 6) ** (beta / (alpha + beta))


def paper() -> Iterator[Profile]:
    for law in LAWS[:2]:
        for budget in 1.5e15 * 4.0 ** np.arange(6):
            yield law, budget, PAPER


def about(sizes: Array) -> Callable[[], Iterator[Profile]]:
    """Return sizes about the best, shifted against it by up to a third of their step."""

    def found() -> Iterator[Profile]:
        step = np.median(np.diff(np.log(sizes)))
        for law in LAWS:
            for budget in (1e16, 1e18):
                for shift in (-0.3, 0.0, 0.3):
                    yield law, budget, best(law, budget) * sizes * np.exp(shift * step)

    return found


def ladder(step: float, count: int) -> Array:
    return step ** (np.arange(count) - (count - 1) / 2)


def outlier(log_n: Array, log_loss: Array, rng: np.random.Generator) -> Array:
    """Raise the loss of one size near the best by 30 %, such as a run at a poor learning rate has."""
    best = int(log_loss.argmin())
    near = np.flatnonzero(optima.near_best(log_n, best, 4.0) & (np.arange(len(log_n)) != best))
    return log_loss + 0.26 * (np.arange(len(log_n)) == rng.choice(near))


CASES: list[tuple[str, Callable[[], Iterator[Profile]], tuple[float, ...], bool]] = [
    ("the paper's sizes", paper, (0.002, 0.005, 0.01, 0.02), False),
    ("the quickstart's three sizes", about(TRIO), (0.005, 0.01, 0.02), False),
    ("7 sizes, factor 1.5", about(ladder(1.5, 7)), (0.002, 0.01), False),
    ("5 sizes, factor 4", about(ladder(4, 5)), (0.002, 0.01), False),
    ("5 sizes, factor 8", about(ladder(8, 5)), (0.002, 0.01), False),
    ("5 sizes, factor 1.5", about(ladder(1.5, 5)), (0.002, 0.01), False),
    ("3 sizes within 5 %", about(ladder(1.025, 3)), (0.002, 0.01), False),
    ("5 sizes within 20 %", about(ladder(1.05, 5)), (0.002, 0.01), False),
    ("3 sizes within 1 %, one 4 times as large", about(np.array([1, 1.005, 1.01, 4])), (0.002, 0.01), False),
    ("7 sizes, factor 1.5, one run 30 % high", about(ladder(1.5, 7)), (0.003,), True),
    ("5 sizes, factor 2, one run 30 % high", about(ladder(2, 5)), (0.003,), True),
]


def counted(made: Callable[[], Iterator[Profile]], noise: float, fault: bool, count: int) -> list[tuple[bool, str]]:
    """Return whether each optimum is good, and its state."""
    rng = np.random.default_rng(0)
    every, found = list(made()), []
    for number in range(count):
        law, budget, sizes = every[number % len(every)]
        truth = np.log(np.ravel(CHINCHILLA.predict(np.array(law), sizes, budget / 6 / sizes)))
        size = best(law, budget)
        lowest = float(np.log(CHINCHILLA.predict(np.array(law), size, budget / 6 / size)).item())
        log_n, log_loss = np.log(sizes), truth + noise * rng.standard_normal(len(sizes))
        if fault:
            log_loss = outlier(log_n, log_loss, rng)
        columns = {"n_parameters": sizes, "loss": np.exp(log_loss), "flop_per_token": 6 * sizes}
        profile = optima.Profile(budget, pd.DataFrame(columns).assign(seeds=1))
        (vertex,), (low,), _ = optima.parabola(log_n, log_loss[None])
        if not np.isfinite(vertex):
            continue
        state = profile.state(noise)[0]
        if state == "interior" and profile.too_deep(low, noise):
            state = "below all runs"
        good = abs(vertex - np.log(size)) < np.log(2) and low - lowest > -max(3 * noise, 0.02)
        found.append((bool(good), state))
    return found


def main(count: int = 400) -> None:
    print('| grid | noise | profiles | bad | good refused | of it "too narrow" | bad passed |')
    print("|---|---|---|---|---|---|---|")
    for name, made, noises, fault in CASES:
        for noise in noises:
            found = counted(made, noise, fault, count)
            good, bad = ([state for told, state in found if told is which] for which in (True, False))
            refused, narrow = (sum(test(state) for state in good) for test in (_refused, _narrow))
            passed = len(bad) - sum(map(_refused, bad))
            print(
                f"| {name} | {noise:g} | {len(found)} | {len(bad)} | {_share(refused, len(good))} "
                f"| {_share(narrow, len(good))} | {_share(passed, len(bad))} |"
            )


def _refused(state: str) -> bool:
    return state != "interior"


def _narrow(state: str) -> bool:
    return state == "too narrow"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    main(*map(int, sys.argv[1:]))
