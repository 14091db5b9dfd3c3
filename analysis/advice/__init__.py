"""What a recipe is made from: limits, forecasts, evidence, choices, and numbers as a reader sees them."""
