"""Offline safe reinforcement learning: one module per algorithm family, trained from a fixed data set."""
