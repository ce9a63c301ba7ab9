"""The safe reinforcement-learning half of the library: tasks, environments, data, algorithms, evaluation."""
