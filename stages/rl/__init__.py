"""Stages of the safe reinforcement-learning branch."""
