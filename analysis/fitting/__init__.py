"""Fit optima, laws and their intervals to a table of runs."""
