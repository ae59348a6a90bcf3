"""Training: what is checked first, the cold start, the loop of RL."""
