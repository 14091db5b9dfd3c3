"""embedscale: compute-optimal recipes for turning language models into embedding models.

One run lives in this package; many runs in `slurm`; what the runs say in `analysis`.
Importing it loads nothing heavy: torch is imported by the verbs that need it.
"""

__version__ = "0.1.0"
