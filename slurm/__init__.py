"""Many runs: the grid of a sweep, its plan, its submission, what runs on a node, its status."""
