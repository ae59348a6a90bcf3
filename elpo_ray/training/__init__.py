"""Training: the loop, the cold start before it, what is checked first."""
