"""`embedscale fit`: runs → optima, laws, intervals, frontier, in one file, fits.json.

Layout of fits.json. Every interval is [low, high], the percentile interval of `settings.confidence`; null stands where
something cannot be said. Loss is in nats, budgets in FLOP of the paper's convention, sizes in non-embedding parameters.

    format         1; `read` refuses others
    version, made  of the package that wrote it; UTC
    source         what was fitted
    settings       {residual, delta, bootstrap, confidence, optimum, window, seed, where}
    runs           {used, excluded, budgets: [...], sizes: [...]}
    comparable     {field: value} of all that had to be the same (evaluation, data, batch size, context)
    noise          {log_loss: standard deviation of ln L, source: "replicates" | "given" | "residuals" | "none",
                    degrees_of_freedom}
    methods        METHOD → {
      points         a row a (budget, size): {budget, params, tokens, loss, flop_per_token, seeds, backbone, tried, and
                     the chosen value of each hyper-parameter that the runs state (learning_rate, rank,
                     trainable_fraction, …), at_grid_end: [hyper-parameters whose best value is the grid's first or
                     last of several]}
      optima         a row a budget: {budget, state: "interior" | "edge" | "too few" | "diverged",
                     n_opt, d_opt, loss (of the estimator in settings.optimum; null unless interior),
                     n_opt_interval, d_opt_interval, loss_interval, valid_share (of bootstrap draws that were interior),
                     parabola, akima, law: {n_opt, d_opt, loss} of each estimator or null,
                     curve: {log_n, curvature} of the parabola ln L = loss + curvature (ln N − log_n)² or null,
                     best: the best point, add_size: parameters of the size to add or null, why: one line}
      power_laws     {n_opt, d_opt, loss} → null (under two interior optima), or y = coefficient × C^exponent:
                     {coefficient, exponent, coefficient_interval, exponent_interval, weighted: {coefficient, exponent,
                     and their intervals}, points, draws: [[ln coefficient, exponent], …]}
      joint_laws     {chinchilla, trainable_fraction} → null, or {E, A, B, alpha, beta} or {E, a_d, b_d, a_s, b_s, c_s,
                     alpha, beta}, and {intervals: {name: interval}, not_fixed: [names that the data do not fix],
                     residual, delta, objective, runs, n_exponent (chinchilla: β/(α+β), N* ∝ C^…), n_exponent_interval,
                     log_residual: standard deviation of ln L about the law,
                     convergence: {starts, agreeing, gradient, iterations, condition},
                     span: {params, tokens, trainable_fraction: [smallest, largest]}, draws: [[coefficients], …]}
                     or {refused: why there is none}
      hold_out       rows {left_out: "largest budget" | "largest size", value, law: "chinchilla" |
                     "trainable_fraction" | "loss" | "n_opt", predicted, found, error (mean of |predicted/found − 1|),
                     bias (mean of predicted/found − 1), points} }
    frontier       {segments: [{method, from, to}] over the budgets that were run, by the laws of the loss,
                    crossings: [{budget, interval, share (of draws that cross), below, above: methods}],
                    comparisons: [{budget, a, b, difference (of ln L, a − b), interval, distinguishable}]}
    excluded       rows {run, reason, detail, method, params, budget}
    notes          lines that a reader should see
"""
