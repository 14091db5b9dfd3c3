"""What a finished run is used for: embed, evaluate, export."""
