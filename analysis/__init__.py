"""What the runs say: optima, laws, intervals, recipes, figures and the report. Nothing here needs torch.

From a table of runs to laws and a recipe:

    import analysis

    runs = analysis.read_runs("runs.csv", columns={"n_parameters": "N", "tokens": "D", "loss": "val_loss"})
    fits = analysis.fit(runs)
    print(fits.methods["full"].joint_laws["chinchilla"].coefficients)
    print(analysis.make_recipe(fits, "1e20", runs=runs).best)

`runs.table` is a pandas DataFrame with a row for each run. The names below are imported when they are first used, so
that `import analysis` is quick.
"""

from embedscale.imports import lazy

# No public name is that of a module of this package.
_PLACES = {
    "Drawn": "analysis.figures.style:Drawn",
    "Fits": "analysis.fits:Fits",
    "Limit": "analysis.advice.evidence:Limit",
    "Recipe": "analysis.advice.recipe:Recipe",
    "Runs": "analysis.runs:Runs",
    "Simulated": "analysis.simulate:Simulated",
    "Study": "analysis.study:Study",
    "draw_figure": "analysis.figures.catalogue:draw",
    "fit": "analysis.fitting.fit:fit",
    "make_recipe": "analysis.recipe:advise",
    "read_fits": "analysis.fits:read",
    "read_runs": "analysis.runs:load",
    "read_study": "analysis.study:load",
    "simulate_sweep": "analysis.simulate:simulate",
    "study_of": "analysis.study:of",
    "write_fits": "analysis.study:write",
}
__all__ = [*_PLACES]
__getattr__, __dir__ = lazy(__name__, _PLACES)
