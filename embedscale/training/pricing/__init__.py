"""What training costs: FLOP and what a budget buys, and the speed of this hardware."""
