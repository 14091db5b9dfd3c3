"""Choose which runs to make, so that a recipe costs a part of its grid."""
