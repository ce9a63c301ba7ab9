"""A synthetic history as the stages would have left it, of any size, for ``lineage_scale.py``."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from springhead.jsonio import canonical, read_json, write_json
from springhead.lineage.digests import file_digest, files_digest, json_digest
from springhead.lineage.ledger import GENESIS
from springhead.lineage.receipts import describe, read_receipts, receipt_path
from springhead.tables import ROW_GROUP

RL_RULES = ("finite", "outlier", "inpaint", "grid", "random")
LLM_RULES = ("length", "unfinished", "answer", "near-duplicate", "contamination")
ALGORITHMS, METHODS = ("bc", "bc-safe", "cdt", "cpq"), ("sft", "mend", "bash", "rac", "rational")
STUDENTS = ("small-llama", "smollm2")
EXPERTS = 4  # policies that collect the episodes of a task
DROPPED, REPLACED = 0.04, 0.01  # share of the rows that each rule drops, and that one rule changes
LEDGER_RUNS = 3  # executions of each stage in the ledger, the last of which wrote the receipt
_HEX = np.frombuffer("".join(f"{value:02x}" for value in range(256)).encode(), np.uint8).reshape(256, 2)


@dataclass
class History:
    """Writes the checkout, and remembers what the questions ask for."""

    root: Path
    rows: int
    models: int
    rng: np.random.Generator
    receipts: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    table_rows: int = 0

    # -- pieces ---------------------------------------------------------------------------------

    def ids(self, count: int) -> pa.StringArray:
        """Returns ids like digests: 64 random hexadecimal digits."""
        text = _HEX[np.frombuffer(self.rng.bytes(count * 32), np.uint8)]
        offsets = np.arange(count + 1, dtype=np.int32) * 64
        return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(text)))

    def table(self, path: str, columns: dict[str, Any]) -> None:
        """Writes a table with the settings of ``springhead.tables.write_table``."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table(columns)
        pq.write_table(table, target, compression="zstd", version="2.6", store_schema=True, row_group_size=ROW_GROUP)
        self.table_rows += len(table)

    def text(self, path: str, text: str) -> None:
        """Writes a file that stands for data or a model."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def describe(self, path: str) -> dict[str, Any]:
        """Returns digest, size and files of a path; many stages read the same."""
        if path not in self.facts:
            self.facts[path] = describe(self.root / path)
        return self.facts[path]

    def stage(
        self,
        name: str,
        output: str,
        reads: Sequence[str] = (),
        models: Sequence[tuple[str, str, dict[str, Any]]] = (),
        datasets: Sequence[tuple[str, int, str]] = (),
        params: dict[str, Any] | None = None,
    ) -> None:
        """Writes the receipt of a stage, of the size that real ones have: about eight kilobytes."""
        branch, step = name.partition("-")[0], name.partition("-")[2].partition("@")[0]
        code = {f"springhead/{branch}/part_{n:02d}.py": hashlib.sha256(f"{n}".encode()).hexdigest() for n in range(34)}
        lock = f"locks/{branch}.lock"
        inputs = {path: {k: v for k, v in self.describe(path).items() if k != "files"} for path in reads}
        inputs |= {path: {"bytes": 9000, "sha256": digest} for path, digest in list(code.items())[:18]}
        receipt = {
            "stage": name,
            "command": f"python -m stages.{branch}.{step} {name.partition('@')[2]}".strip(),
            "params": {"seed": 0, f"{branch}.{step}": params or {"steps": 1200}},
            "seed": 11,
            "dependencies": inputs | {lock: {"bytes": 400, "sha256": "1" * 64}},
            "code": {"digest": files_digest(code), "files": code},
            "environment": {
                "python": "3.11",
                "lock": {lock: "1" * 64},
                "packages": {f"package-{n:02d}": "1.2.3" for n in range(14)},
            },
            "outputs": {output: self.describe(output)},
            "datasets": [
                {"name": path, "path": path, "sha256": self.describe(path)["sha256"], "rows": rows, "role": role}
                for path, rows, role in datasets
            ],
            "models": [
                {"path": f"{output}/{p}", "sha256": describe(self.root / output / p)["sha256"], "kind": k, "facts": f}
                for p, k, f in models
            ],
            "metrics": {"loss": 0.5},
        }
        write_json(receipt_path(self.root, name), receipt)
        self.receipts[name] = receipt

    # -- the two branches -----------------------------------------------------------------------

    def filtered(self, folder: str, columns: dict[str, Any], rules: Sequence[str]) -> int:
        """Writes what a filter stage makes of a table: decisions rule by rule, and the rows that are left."""
        ids = columns["id"]
        left = np.arange(len(ids))
        looked, kept, named = [], [], []
        for rule in rules:
            stays = self.rng.random(len(left)) >= DROPPED
            looked.append(left)
            kept.append(stays)
            named += [rule] * len(left)
            left = left[stays]
        changed = left[self.rng.random(len(left)) < REPLACED]
        fresh = self.ids(len(changed))
        order, keeps = np.concatenate([*looked, changed]), np.concatenate([*kept, np.ones(len(changed), bool)])
        before = pa.nulls(len(order) - len(changed), pa.string())
        self.table(f"{folder}/decisions.parquet", {
            "id": ids.take(pa.array(order)),
            "rule": pa.array(named + ["repair"] * len(changed)),
            "kept": pa.array(keeps),
            "value": self.rng.random(len(order)),
            "threshold": np.full(len(order), 0.96),
            "replaced_by": pa.concat_arrays([before, fresh]),
        })  # fmt: skip
        after = pa.table(columns).take(pa.array(left))
        new = pa.array(np.where(np.isin(left, changed), np.cumsum(np.isin(left, changed)) - 1, -1))
        is_new = pa.compute.greater_equal(new, 0)
        renamed = pa.compute.if_else(is_new, fresh.take(pa.compute.max_element_wise(new, 0)), after["id"])
        final = {n: after[n] for n in after.column_names} | {"id": renamed, "index": np.arange(len(left))}
        if "parents" in final and len(changed):
            sources = pa.ListArray.from_arrays(np.arange(len(left) + 1, dtype=np.int32), after["id"].combine_chunks())
            old = after["parents"].combine_chunks()
            final["parents"] = pa.compute.if_else(is_new, sources, old)
        self.table(f"{folder}/rows.parquet", final)
        gone = np.setdiff1d(np.arange(len(ids)), left)
        kept_now = np.setdiff1d(left, changed)
        self.samples |= {
            f"{folder}: a kept row": ids[int(kept_now[len(kept_now) // 2])].as_py(),
            f"{folder}: a dropped row": ids[int(gone[len(gone) // 2])].as_py(),
            f"{folder}: a changed row": ids[int(changed[0])].as_py(),
        }
        return len(left)

    def validated(self, name: str, folder: str, data: str, rows: int) -> None:
        """Writes a verdict with a quarantine list, and the receipt of the stage."""
        expectations = [
            {"name": f"Expect{n}", "severity": "critical", "success": True, "column": "costs", "observed": n}
            for n in range(16)
        ]
        verdict = {"suite": name, "data_digest": self.describe(data)["sha256"], "success": True, "severity": "none"}
        write_json(self.root / folder / "verdict.json", verdict | {
            "expectations": expectations, "quarantined": 5, "rows": rows, "suite_digest": "2" * 64})  # fmt: skip
        failed = {"expectation": ["Expect3"] * 5, "severity": ["warning"] * 5, "detail": [""] * 5}
        self.table(f"{folder}/quarantine.parquet", {"id": self.ids(5), **failed})
        self.stage(name, folder, [data])

    def model(self, folder: str, *content: object) -> None:
        """Writes a folder that stands for a model."""
        self.text(f"{folder}/config.json", f"{content}\n")
        self.text(f"{folder}/model.safetensors", json_digest([str(c) for c in content]) * 64)

    def task(self, task: str, rows: int, models: int) -> None:
        """Writes one task of the safe-RL branch: experts, episodes, filter, verdict, policies, evaluation."""
        experts = []
        for index in range(EXPERTS):
            self.model(f"data/rl/experts/{task}/p{index}", task, index)
            facts = {"task": task, "algorithm": "ppo-lag", "cost_limit": 10.0 * index}
            experts.append((f"p{index}", "policy", facts))
        self.stage(f"rl-experts@{task}", f"data/rl/experts/{task}", models=experts)
        policies = [m["sha256"] for m in self.receipts[f"rl-experts@{task}"]["models"]]
        who = np.arange(rows) % EXPERTS
        columns = {
            "id": self.ids(rows),
            "parents": pa.ListArray.from_arrays(np.zeros(rows + 1, np.int32), pa.array([], pa.string())),
            "policy": pa.array(policies).take(pa.array(who)),
            "algorithm": pa.array(["ppo-lag"]).take(pa.array(np.zeros(rows, np.int64))),
            "cost_limit": 10.0 * who,
            "seed": np.arange(rows),
            "deterministic": np.zeros(rows, bool),
            "episode_return": self.rng.normal(size=rows),
            "cost_return": self.rng.random(rows),
            "length": np.full(rows, 200),
            "index": np.arange(rows),
        }
        collect, kept = f"data/rl/collect/{task}", f"data/rl/filter/{task}"
        self.text(f"{collect}/dataset.hdf5", f"episodes of {task}")
        self.table(f"{collect}/rows.parquet", columns)
        data = [(f"{collect}/dataset.hdf5", rows, "output")]
        self.stage(f"rl-collect@{task}", collect, [f"data/rl/experts/{task}"], datasets=data)
        self.text(f"{kept}/dataset.hdf5", f"what is left of {task}")
        left = self.filtered(kept, columns, RL_RULES)
        self.stage(f"rl-filter@{task}", kept, [collect], datasets=[(f"{kept}/dataset.hdf5", left, "output")])
        self.validated(f"rl-validate@{task}", f"data/rl/validate/{task}", kept, left)
        entries = []
        for index in range(models):
            algorithm, seed = ALGORITHMS[index % len(ALGORITHMS)], index // len(ALGORITHMS)
            out = f"data/rl/train/{task}/{algorithm}/{seed}"
            self.model(f"{out}/model", task, algorithm, seed)
            facts = {"task": task, "algorithm": algorithm, "seed": seed}
            trained = [(f"{kept}/dataset.hdf5", left, "training")]
            reads = [kept, f"data/rl/validate/{task}"]
            params = {"steps": 1200, algorithm: {"learning_rate": 1e-4, "hidden": [256, 256]}}
            name = f"rl-train@{task}-{algorithm}-{seed}"
            self.stage(name, out, reads, [("model", "policy", facts)], trained, params)
            digest = self.receipts[name]["models"][0]["sha256"]
            limits = {limit: {"normalised_return": 0.6, "normalised_cost": 0.8} for limit in ("10", "20", "40")}
            entries.append({"path": f"{out}/model", "digest": digest, "limits": limits})
        write_json(self.root / f"data/rl/evaluate/{task}/summary.json", {"task": task, "models": entries})
        self.stage(f"rl-evaluate@{task}", f"data/rl/evaluate/{task}", [f"data/rl/train/{task}"])

    def language(self, problems: int, rows: int, models: int) -> None:
        """Writes the language branch: one large text data set, many fine-tuned models on it."""
        ids = self.ids(problems)
        self.samples["data/llm/problems: a row with children"] = ids[problems // 2].as_py()

        def columns(count: int, parents: pa.Array, own: pa.Array, method: pa.Array) -> dict[str, Any]:
            same = pa.array(np.zeros(count, np.int64))
            return {
                "id": own,
                "parents": parents,
                "split": pa.array(["id"]).take(same),
                "method": method,
                "operator": pa.array(["order"]).take(same),
                "variant": np.arange(count) % 7,
                "family": pa.array(["dag"]).take(same),
                "generator": pa.compute.binary_join_element_wise(method, "order", "."),
                "index": np.arange(count),
                "file": pa.array(["train.jsonl"]).take(same),
            }

        none = pa.ListArray.from_arrays(np.zeros(problems + 1, np.int32), pa.array([], pa.string()))
        self.text("data/llm/problems/train.jsonl", "problems\n")
        self.table("data/llm/problems/rows.parquet", columns(problems, none, ids, pa.nulls(problems, pa.string())))
        self.stage(
            "llm-problems", "data/llm/problems", datasets=[("data/llm/problems/train.jsonl", problems, "output")]
        )
        parents = ids.take(pa.array(np.sort(np.arange(rows) % problems)))
        methods = pa.array(METHODS).take(pa.array(np.arange(rows) % len(METHODS)))
        made = columns(rows, pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32), parents), self.ids(rows),
                       methods)  # fmt: skip
        self.text("data/llm/generate/train.jsonl", "texts\n")
        self.table("data/llm/generate/rows.parquet", made)
        self.stage("llm-generate", "data/llm/generate", ["data/llm/problems"])
        kept = "data/llm/filter"
        self.text(f"{kept}/train.jsonl", "what is left\n")
        left = self.filtered(kept, made, LLM_RULES)
        self.stage("llm-filter", kept, ["data/llm/generate"], datasets=[(f"{kept}/train.jsonl", left, "output")])
        self.validated("llm-validate", "data/llm/validate", kept, left)
        entries: dict[str, list[dict[str, Any]]] = {student: [] for student in STUDENTS}
        for student in STUDENTS:
            self.model(f"data/llm/students/{student}", student)
            self.stage(f"llm-students@{student}", f"data/llm/students/{student}")
        for index in range(models):
            student = STUDENTS[index % len(STUDENTS)]
            method, seed = METHODS[index // len(STUDENTS) % len(METHODS)], index // len(STUDENTS) // len(METHODS)
            out, name = f"data/llm/finetune/{student}/{method}/{seed}", f"llm-finetune@{student}-{method}-{seed}"
            self.model(f"{out}/model", student, method, seed)
            facts = {"student": student, "method": method, "seed": seed}
            trained = [(f"{kept}/train.jsonl", left // len(METHODS), "training")]
            reads = [kept, f"data/llm/students/{student}", "data/llm/validate"]
            self.stage(name, out, reads, [("model", "language-model", facts)], trained)
            entries[student].append({"path": f"{out}/model", "digest": self.receipts[name]["models"][0]["sha256"],
                                     "metrics": {"accuracy": 0.8, "worst_case": 0.6}})  # fmt: skip
        for student in STUDENTS:
            write_json(self.root / f"data/llm/evaluate/{student}/summary.json", {"models": entries[student]})
            reads = [f"data/llm/finetune/{student}", "data/llm/problems"]
            self.stage(f"llm-evaluate@{student}", f"data/llm/evaluate/{student}", reads)

    # -- ledger and registry --------------------------------------------------------------------

    def bodies(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the ledger's entries: executions of every stage, then one promotion per task."""
        for turn in range(LEDGER_RUNS):
            for name, receipt in self.receipts.items():
                digest = file_digest(receipt_path(self.root, name)) if turn == LEDGER_RUNS - 1 else str(turn) * 64
                yield "execution", {
                    "execution": json_digest([name, turn])[:32], "stage": name, "attempt": turn + 1,
                    "receipt": digest, "inputs": json_digest(name), "host": "host", "python": "3.11.7",
                    "outputs": {out: facts["sha256"] for out, facts in receipt["outputs"].items()},
                    "models": [{k: m[k] for k in ("path", "sha256", "kind")} for m in receipt["models"]],
                    "git": {"revision": "0" * 40, "dirty": False}, "started": "2026-01-02T03:04:05+00:00",
                    "seconds": 60.0, "cpu_seconds": 80.0, "flow_run": "",
                }  # fmt: skip
        for name, digest in self.champions().items():
            yield (
                "promotion",
                {"model": name, "version": "1", "digest": digest, "signature": "5" * 64, "previous": None},
            )

    def champions(self) -> dict[str, str]:
        """Returns the registered name and the digest of one model per task, and of one language model."""
        found = {f"policy-{s.partition('@')[2].partition('-')[0]}": r["models"][0]["sha256"]
                 for s, r in self.receipts.items() if s.startswith("rl-train@")}  # fmt: skip
        text = next(r for s, r in self.receipts.items() if s.startswith("llm-finetune@"))
        return found | {"text-small-llama": text["models"][0]["sha256"]}

    def write_ledger(self, home: Path) -> int:
        """Writes a chained ledger and returns its number of entries."""
        home.mkdir(parents=True, exist_ok=True)
        last, count = GENESIS, 0
        with (home / "ledger.jsonl").open("wb") as file:
            for count, (kind, body) in enumerate(self.bodies(), start=1):
                entry = {"seq": count - 1, "prev": last, "time": "2026-01-02T03:04:05.000+00:00", "kind": kind}
                line = canonical(entry | {"body": body})
                last = hashlib.sha256(line).hexdigest()
                file.write(line + b"\n")
        return count

    def register(self, home: Path) -> str:
        """Registers a champion in MLflow and returns how to ask for it."""
        from springhead import tracking
        from springhead.versions import AT, CHAMPION, DIGEST

        client = tracking.connect(home)
        name, digest = next(iter(self.champions().items()))
        if client.search_registered_models(filter_string=f"name = '{name}'"):
            return f"models:/{name}@{CHAMPION}"  # of an earlier run
        client.create_registered_model(name)
        client.create_model_version(name, source=str(home), tags={DIGEST: digest, AT: "model"})
        client.set_registered_model_alias(name, CHAMPION, "1")
        return f"models:/{name}@{CHAMPION}"


def write_history(root: Path, rows: int, models: int, seed: int = 0) -> History:
    """Writes a history of ``rows`` distinct collected and generated rows, and ``models`` trained models."""
    history = History(root, rows, models, np.random.default_rng(seed))
    (root / "dvc.yaml").parent.mkdir(parents=True, exist_ok=True)
    (root / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    policies = models * 72 // 100
    tasks = max(1, policies // 16)
    problems, texts = rows * 6 // 100, rows * 40 // 100
    episodes = rows - problems - texts
    for index in range(tasks):
        share = episodes // tasks + (index < episodes % tasks)
        history.task(f"Task{index:03d}", share, policies // tasks + (index < policies % tasks))
    history.language(problems, texts, models - policies)
    return history


def reread(root: Path) -> History | None:
    """Returns the history that an earlier run kept in a folder, or None."""
    if not (root / "history.json").is_file():
        return None
    kept = read_json(root / "history.json")
    history = History(root, kept["rows"], kept["models"], np.random.default_rng(0), read_receipts(root))
    history.samples, history.table_rows = kept["samples"], kept["table_rows"]
    return history
