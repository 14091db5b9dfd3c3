"""Faster blocks for a CPU. Deleting this folder changes the speed, never a result."""
