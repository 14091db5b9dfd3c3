"""Where runs are sent: a scheduler's queue, or this machine."""
