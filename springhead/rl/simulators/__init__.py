"""The simulators behind the tasks, one module each; ``springhead.rl.envs`` makes environments from them."""
