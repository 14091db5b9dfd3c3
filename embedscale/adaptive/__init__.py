"""Sweeps that choose their own runs."""
