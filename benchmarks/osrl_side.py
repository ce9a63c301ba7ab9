"""OSRL's side of the offline benchmarks; runs in the peers' environment (``make peers``).

    .venv-peers/bin/python benchmarks/osrl_side.py train jobs.json
    .venv-peers/bin/python benchmarks/osrl_side.py speed cpq speed.json <pipes>

Everything is OSRL's own: algorithms, trainers, data sets, PyTorch's ``DataLoader`` as in its training scripts, and the
trainers' ``rollout`` for evaluation, in DSRL's environments. Its logger, which writes to Weights & Biases, is replaced
by one that keeps a few of the figures. The loop below is the one of its scripts ``examples/train/train_*.py``.

A file of jobs is a JSON list; each job has ``algorithm``, ``task``, ``data`` (the HDF5 file), ``seed``, ``limit``,
``steps``, ``parameters`` (OSRL's names), ``workers``, ``threads``, ``targets`` (return target by limit, CDT only),
``courses`` (what to keep of the trainer's figures), ``episodes`` and ``result`` (the file to write). Jobs whose result
file is there are left out by the caller.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import gymnasium  # noqa: E402
import numpy as np  # noqa: E402
import osrl.algorithms as algorithms  # noqa: E402
import torch  # noqa: E402
from dsrl.offline_env import OfflineEnvWrapper, wrap_env  # noqa: E402
from fsrl.utils import DummyLogger  # noqa: E402
from osrl.common import SequenceDataset, TransitionDataset  # noqa: E402
from osrl.common.dataset import process_bc_dataset  # noqa: E402
from osrl.common.exp_util import seed_all  # noqa: E402
from rl_sides import serve  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

Job = dict[str, Any]
CLASSES = {
    "bc-safe": "BC", "bcq-lag": "BCQL", "bear-lag": "BEARL", "cpq": "CPQ", "coptidice": "COptiDICE", "cdt": "CDT",
}  # fmt: skip
RATES = ("actor_lr", "critic_lr", "vae_lr", "alpha_lr", "scalar_lr")
OF_CDT_TRAINER = (
    "learning_rate", "weight_decay", "betas", "clip_grad", "lr_warmup_steps", "loss_cost_weight", "loss_state_weight",
)  # fmt: skip
OF_CDT_DATA = ("deg", "max_rew_decrease", "beta", "augment_percent", "max_reward", "min_reward", "cost_sample")


class Courses(DummyLogger):
    """Keeps every ``every``-th value of some of what a trainer reports, and nothing else.

    Args:
        every: Updates between kept values; 0 keeps nothing.
        names: The values' names.
    """

    def __init__(self, every: int, names: Sequence[str] = ()) -> None:
        self.every = every
        self.names = names
        self.kept: dict[str, list[list[float]]] = {}
        self.step = 0

    def store(self, tab: str | None = None, **values: float) -> None:
        """Keeps the values of a step that is to be kept."""
        if self.every and self.step % self.every == 0:
            for key, value in values.items():
                name = key.removeprefix("loss/")
                if name in self.names:
                    self.kept.setdefault(name, []).append([self.step, round(float(value), 4)])


class Trained:
    """A model of OSRL's with its trainer and its endless stream of batches.

    Args:
        job: See the module's text.
        logger: Given to the trainer.
    """

    def __init__(self, job: Job, logger: DummyLogger) -> None:
        seed_all(job["seed"])
        torch.set_num_threads(job["threads"])
        self.kind = job["algorithm"]
        self.parameters = p = dict(job["parameters"])
        self.scale = 1.0 if self.kind == "bc-safe" else p["reward_scale"]
        env = gymnasium.make(f"Offline{job['task']}-v0")
        data = env.unwrapped.get_dataset(h5path=job["data"])
        env.unwrapped.set_target_cost(job["limit"])
        if self.kind != "bc-safe":
            env = OfflineEnvWrapper(wrap_env(env=env, reward_scale=self.scale))
        self.env = env
        sizes = {
            "state_dim": env.observation_space.shape[0], "action_dim": env.action_space.shape[0],
            "max_action": float(env.action_space.high[0]),
        }  # fmt: skip
        stream = self._data(data, p, job)
        loader = DataLoader(stream, batch_size=p.pop("batch_size"), pin_memory=True, num_workers=job["workers"])
        self.batches: Iterator[Any] = iter(loader)
        self._build(sizes, p, job, stream, logger)
        self.stream = stream

    def _data(self, data: dict[str, np.ndarray], p: dict[str, Any], job: Job) -> Any:
        if self.kind == "bc-safe":
            process_bc_dataset(data, job["limit"], 1.0, p.pop("bc_mode"))
            return TransitionDataset(data)
        if self.kind == "cdt":
            chosen = {key: p.pop(key) for key in OF_CDT_DATA}
            return SequenceDataset(
                data, seq_len=p["seq_len"], reward_scale=self.scale, cost_transform=lambda cost: 70 - cost, **chosen
            )
        return TransitionDataset(data, reward_scale=self.scale, state_init=self.kind == "coptidice")

    def _build(self, sizes: dict[str, Any], p: dict[str, Any], job: Job, stream: Any, logger: DummyLogger) -> None:
        name = CLASSES[self.kind]
        rates = {key: p.pop(key) for key in RATES if key in p}
        p.pop("reward_scale", None)
        if self.kind == "cdt":
            rates = {key: p.pop(key) for key in OF_CDT_TRAINER}
            p["target_entropy"] = -sizes["action_dim"]
        elif self.kind != "bc-safe":
            p["cost_limit"] = job["limit"]
        if self.kind == "coptidice":
            share, observations_std, actions_std = stream.get_dataset_states()
            p |= {"init_state_propotion": share, "observations_std": observations_std, "actions_std": actions_std}
        self.model = getattr(algorithms, name)(**sizes, **p)
        if self.kind != "bc-safe":
            rates["reward_scale"] = self.scale
        self.trainer = getattr(algorithms, f"{name}Trainer")(self.model, self.env, logger=logger, **rates)

    def update(self) -> None:
        """One turn of the loop of OSRL's scripts: the next batch, and a step on it."""
        batch = [part.to("cpu") for part in next(self.batches)]
        if self.kind == "bc-safe":
            self.trainer.train_one_step(batch[0], batch[2])
        elif self.kind == "coptidice":
            self.trainer.train_one_step(batch)
        else:
            self.trainer.train_one_step(*batch)

    def evaluate(self, limit: float, episodes: int, target: float | None) -> dict[str, Any]:
        """Whole episodes by the trainer's own ``rollout``; returns and costs as the environment gives them."""
        self.model.eval()
        returns, costs = [], []
        for _ in range(episodes):
            if self.kind == "cdt":
                assert target is not None
                found = self.trainer.rollout(self.model, self.env, target * self.scale, limit)
            else:
                found = self.trainer.rollout()
            returns.append(round(float(found[0]) / self.scale, 4))
            costs.append(round(float(found[2]), 4))
        self.model.train()
        return {"limit": limit, "target": target, "returns": returns, "costs": costs}

    @torch.no_grad()
    def probe(self) -> dict[str, float]:
        """CPQ's cost critic over 4096 states of the data: its mean for the data's actions, and for uniform ones."""
        generator = np.random.default_rng(0)
        data = self.stream.dataset
        rows = generator.integers(len(data["observations"]), size=4096)
        seen, actions = (torch.from_numpy(data[key][rows]) for key in ("observations", "actions"))
        uniform = torch.from_numpy(generator.uniform(-1, 1, actions.shape).astype(np.float32))
        found = {"data": actions, "uniform": uniform}
        critic = self.model.cost_critic
        return {f"cost_value_{key}": round(float(critic.predict(seen, a)[0].mean()), 4) for key, a in found.items()}

    def save(self, path: Path) -> None:
        """Writes the model's weights as plain arrays."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{key: value.numpy() for key, value in self.model.state_dict().items()})


def run(job: Job) -> None:
    """Trains one job, evaluates it and writes its result file."""
    logger = Courses(max(1, job["steps"] // 20), job["courses"])
    trained = Trained(job, logger)
    started = time.perf_counter()
    for logger.step in range(job["steps"]):
        trained.update()
    seconds = time.perf_counter() - started
    targets = job.get("targets") or {str(job["limit"]): None}
    seed_all(1000 + job["seed"])  # DSRL's environments draw their starts from NumPy's global generator
    evaluations = [trained.evaluate(float(limit), job["episodes"], target) for limit, target in targets.items()]
    if "weights" in job:
        trained.save(Path(job["weights"]))
    result = {
        "side": "osrl", **{key: job[key] for key in ("algorithm", "task", "seed", "limit", "steps", "workers")},
        "parameters": job["parameters"], "data_sha256": job["data_sha256"], "seconds": round(seconds, 1),
        "evaluations": evaluations, "courses": logger.kept,
        "probe": trained.probe() if trained.kind == "cpq" else {},
        "versions": {"osrl-lib": "0.1.0", "torch": torch.__version__, "numpy": np.__version__},
    }  # fmt: skip
    path = Path(job["result"])
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(result, sort_keys=True) + "\n", encoding="utf-8")
    whole.rename(path)


def train(jobs: str) -> None:
    """Runs a file of jobs in turn; one that fails does not take the others with it."""
    failed = 0
    todo = json.loads(Path(jobs).read_text(encoding="utf-8"))
    for number, job in enumerate(todo, start=1):
        name = Path(job["result"]).stem
        started = time.perf_counter()
        try:
            run(job)
        except Exception as error:
            failed += 1
            print(f"[{number}/{len(todo)}] {name}: FAILED: {type(error).__name__}: {error}", flush=True)
            continue
        print(f"[{number}/{len(todo)}] {name}: {time.perf_counter() - started:.0f} s", flush=True)
    sys.exit(1 if failed else 0)


def speed(jobs: str) -> None:
    """Answers requests for so many updates of one of the file's jobs, chosen by its name; all stay warm."""
    wanted = {job["name"]: job for job in json.loads(Path(jobs).read_text(encoding="utf-8"))}
    ready: dict[str, Trained] = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        name = request["name"]
        if name not in ready:
            ready.clear()  # the loader processes of one job must not disturb the next
            ready[name] = Trained(wanted[name], Courses(0))
        one = ready[name]
        start, cpu = time.perf_counter(), time.process_time()
        number = _updates(one.update, request["updates"], request["seconds"])
        return {"steps": number, "seconds": time.perf_counter() - start, "process_cpu": time.process_time() - cpu}

    serve(answer)


def _updates(update: Callable[[], None], at_most: int, seconds: float) -> int:
    end, number = time.perf_counter() + seconds, 0
    while number < at_most and time.perf_counter() < end:
        update()
        number += 1
    return number


if __name__ == "__main__":
    os.environ["WANDB_MODE"] = "disabled"
    {"train": train, "speed": speed}[sys.argv[1]](sys.argv[2])
