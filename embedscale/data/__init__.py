"""From text pairs to a store of tokenised pairs."""
