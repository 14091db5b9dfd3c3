"""The figures of the paper, drawn from any sweep."""
