"""What the runs say: loading, IsoFLOP optima, laws, intervals, recipe, figures, report. Nothing here needs torch."""
