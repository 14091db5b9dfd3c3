"""Optima, laws and their intervals, fitted to a table of runs."""
