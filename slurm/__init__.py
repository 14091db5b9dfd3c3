"""Many runs: the grid of a sweep, its plan, its submission and its status."""
