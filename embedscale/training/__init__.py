"""One training run: plan, step, loss, callbacks, record."""
