"""FSRL's side of the benchmarks; runs in the peers' environment (``make peers``).

    .venv-peers/bin/python benchmarks/fsrl_side.py collect BallCircle shmem 10 weights.npz <pipes>
    .venv-peers/bin/python benchmarks/fsrl_side.py train BallCircle dummy 10 20 4 512 <pipes>

Everything is FSRL's own: its agents, collector and trainer, its vector environments (tianshou's), its tasks' ids.
"""

import sys
import warnings
from typing import Any

import gymnasium
import numpy as np
import torch

warnings.simplefilter("ignore")

import bullet_safety_gym  # noqa: E402, F401  (registers the ids)
from fsrl.agent import PPOLagAgent  # noqa: E402
from fsrl.data import FastCollector  # noqa: E402
from fsrl.trainer import OnpolicyTrainer  # noqa: E402
from rl_sides import serve  # noqa: E402
from tianshou.data import VectorReplayBuffer  # noqa: E402
from tianshou.env import DummyVectorEnv, ShmemVectorEnv, SubprocVectorEnv  # noqa: E402

VECTORS = {"dummy": DummyVectorEnv, "shmem": ShmemVectorEnv, "subproc": SubprocVectorEnv}
HIDDEN = (64, 64)


def load_weights(actor: torch.nn.Module, path: str) -> None:
    """Puts our policy's weights into FSRL's actor: two hidden layers, tanh of the mean, a free deviation."""
    weights = np.load(path)
    linear = [layer for layer in actor.modules() if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        for index, layer in enumerate(linear):
            layer.weight.copy_(torch.from_numpy(weights[f"net.{2 * index}.weight"]))
            layer.bias.copy_(torch.from_numpy(weights[f"net.{2 * index}.bias"]))
        actor.sigma_param.copy_(torch.from_numpy(weights["log_std"])[:, None])


def collect(task: str, kind: str, number: str, weights: str) -> None:
    """Collects episodes with stochastic actions into FSRL's replay buffer, as its trainer does."""
    name = f"Safety{task}-v0"
    agent = PPOLagAgent(gymnasium.make(name), thread=1, hidden_sizes=HIDDEN)
    load_weights(agent.policy.actor, weights)
    agent.policy.train()
    envs = VECTORS[kind]([lambda: gymnasium.make(name) for _ in range(int(number))])
    collector = FastCollector(agent.policy, envs, VectorReplayBuffer(100_000, int(number)), exploration_noise=True)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        collector.reset_buffer()
        result = collector.collect(n_episode=request["episodes"])
        return {"steps": int(result["n/st"]), "cost": float(result["cost"])}

    serve(answer)


def train(task: str, kind: str, number: str, episodes: str, epochs: str, minibatch: str) -> None:
    """Trains PPO-Lag with FSRL's trainer; every request is one of its epochs, of so many environment steps."""
    name = f"Safety{task}-v0"
    # A target that is never reached, so that both sides do all epochs over all minibatches.
    agent = PPOLagAgent(gymnasium.make(name), thread=1, hidden_sizes=HIDDEN, target_kl=1e9, max_grad_norm=0.5, seed=0)
    envs = VECTORS[kind]([lambda: gymnasium.make(name) for _ in range(int(number))])
    collector = FastCollector(agent.policy, envs, VectorReplayBuffer(100_000, int(number)), exploration_noise=True)
    trainer = iter(  # as agent.learn makes it, but so that it can be asked for one epoch after another
        OnpolicyTrainer(
            agent.policy, collector, max_epoch=10_000, batch_size=int(minibatch), cost_limit=agent.cost_limit,
            step_per_epoch=1, repeat_per_collect=int(epochs), episode_per_collect=int(episodes),
            episode_per_test=2, save_model_interval=10_000, logger=agent.logger, verbose=False, show_progress=False,
        )
    )  # fmt: skip

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        trainer.step_per_epoch = request["steps"]
        before = collector.collect_step
        next(trainer)
        return {"steps": collector.collect_step - before}

    serve(answer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"collect": collect, "train": train}[sys.argv[1]](*sys.argv[2:-2])
