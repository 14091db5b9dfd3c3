"""Translate a fits.json of version 0.1 (format 1) into today's layout.

Format 1 had other names for N and C, and it had hyper-parameters and coefficients beside the other keys.
"""

from collections.abc import Mapping
from typing import Any

from analysis.columns import FIRST_VERSION, HYPERPARAMETERS


def translated(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fits.json of format 1 in the layout of format 2, without its format. Raise KeyError for a lost key."""
    names = {"from": "from_flop", "to": "to_flop"} | FIRST_VERSION
    return {
        **old,
        "methods": {name: _old_method(method) for name, method in old["methods"].items()},
        "frontier": {
            part: [{names.get(key, key): value for key, value in row.items()} for row in rows]
            for part, rows in old["frontier"].items()
        },
        "excluded": list(map(_old_names, old["excluded"])),
    }


def _old_names(row: Mapping[str, Any]) -> dict[str, Any]:
    return {FIRST_VERSION.get(key, key): value for key, value in row.items()}


def _old_point(row: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {key: value for key, value in row.items() if key in HYPERPARAMETERS}
    return {key: value for key, value in _old_names(row).items() if key not in chosen} | {"hyperparameters": chosen}


def _old_method(method: Mapping[str, Any]) -> dict[str, Any]:
    laws = {name: law for name, law in method["joint_laws"].items() if law}
    fitted = {name: law for name, law in laws.items() if "refused" not in law}
    return {
        **method,
        "points": list(map(_old_point, method["points"])),
        "optima": [_old_names(row) | {"best": row["best"] and _old_point(row["best"])} for row in method["optima"]],
        "joint_laws": {
            name: law
            | {
                "law": name,
                "coefficients": {key: law[key] for key in law["intervals"]},
                "span": _old_names(law["span"]),
            }
            for name, law in fitted.items()
        },
        "refused": {name: law["refused"] for name, law in laws.items() if "refused" in law},
    }
