"""What a run is: configuration, method, cost, record and directory. Nothing here imports torch."""
