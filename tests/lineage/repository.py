"""Writes a repository as the harness would leave it, without running anything in it."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from springhead.jsonio import write_json
from springhead.keys import Keys
from springhead.lineage.digests import file_digest, files_digest, json_digest, tree_digest
from springhead.lineage.ledger import Ledger
from springhead.lineage.receipts import describe, receipt_path

EPISODES, PROBLEMS = 8, 3
PARAMS: dict[str, Any] = {
    "seed": 7,
    "rl": {
        "experts": {"steps": 1000},
        "collect": {"episodes": EPISODES},
        "filter": {"outlier": 100.0},
        "validate": {"least": 2},
        "train": {"steps": 50},
        "evaluate": {"episodes": 20},
    },
    "llm": {
        "problems": {"count": PROBLEMS},
        "generate": {"variants": 2},
        "filter": {"longest": 400},
        "validate": {"least": 1},
        "students": {"layers": 2},
        "finetune": {"steps": 30},
        "evaluate": {"variants": 2},
    },
}
REVISION = "0123456789abcdef0123456789abcdef01234567"


def digest_of(*parts: object) -> str:
    """Returns an id: the digest of some content."""
    return json_digest([str(part) for part in parts])


class Sample:
    """Writes stages one after the other, as the harness would leave them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.declared: dict[str, dict[str, Any]] = {}
        root.mkdir(parents=True, exist_ok=True)
        (root / "params.yaml").write_text(yaml.safe_dump(PARAMS), encoding="utf-8")
        for branch in ("rl", "llm"):
            lock = root / "locks" / f"{branch}.lock"
            lock.parent.mkdir(exist_ok=True)
            lock.write_text("numpy==2.4.6\n", encoding="utf-8")

    def stage(
        self,
        name: str,
        output: str,
        reads: Sequence[str] = (),
        models: Mapping[str, tuple[str, dict[str, Any]]] | None = None,
        datasets: Sequence[tuple[str, str, int, str]] = (),
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes the receipt and the ledger entry of a stage whose files lie at ``output``."""
        branch, step = name.partition("-")[0], name.partition("-")[2].partition("@")[0]
        code = self.root / "stages" / branch / f"{step}.py"
        code.parent.mkdir(parents=True, exist_ok=True)
        if not code.exists():
            code.write_text(f'"""The {step} stage."""\n', encoding="utf-8")
        lock = f"locks/{branch}.lock"
        deps = [code.relative_to(self.root).as_posix(), lock, *reads]
        files = {deps[0]: file_digest(code)}
        outputs = {output: describe(self.root / output)}
        if metrics is not None:
            write_json(self.root / f"data/metrics/{name}.json", metrics)
            outputs[f"data/metrics/{name}.json"] = describe(self.root / f"data/metrics/{name}.json")
        params = {"seed": PARAMS["seed"], f"{branch}.{step}": PARAMS[branch][step]}
        inputs = {d: {k: v for k, v in describe(self.root / d).items() if k != "files"} for d in deps}
        receipt = {
            "stage": name,
            "command": f"python -m stages.{branch}.{step} {name.partition('@')[2]}".strip(),
            "params": params,
            "seed": 11,
            "dependencies": inputs,
            "code": {"digest": files_digest(files), "files": files},
            "environment": {"lock": {lock: file_digest(self.root / lock)}, "packages": {"numpy": "2.4.6"}},
            "outputs": outputs,
            "datasets": [
                {"name": n, "path": p, "sha256": tree_digest(self.root / p), "rows": r, "role": role}
                for n, p, r, role in datasets
            ],
            "models": [
                {"path": f"{output}/{p}", "sha256": tree_digest(self.root / output / p), "kind": kind, "facts": facts}
                for p, (kind, facts) in (models or {}).items()
            ],
            "metrics": dict(metrics or {}),
        }
        write_json(receipt_path(self.root, name), receipt)
        self._record(name, receipt, json_digest({"stage": name, "params": params, "dependencies": inputs}))
        self._declare(name, deps, list(params), list(outputs))

    def _record(self, name: str, receipt: dict[str, Any], inputs: str) -> None:
        body = {
            "execution": digest_of("execution", name)[:32],
            "stage": name,
            "attempt": 1,
            "receipt": file_digest(receipt_path(self.root, name)),
            "inputs": inputs,
            "outputs": {path: facts["sha256"] for path, facts in receipt["outputs"].items()},
            "models": [{key: m[key] for key in ("path", "sha256", "kind")} for m in receipt["models"]],
            "git": {"revision": REVISION, "dirty": False},
            "host": "sample",
            "python": "3.11.7",
            "started": "2026-01-02T03:04:05+00:00",
            "seconds": 12.5,
            "flow_run": "",
        }
        home = self.root / ".springhead"
        Ledger(home).append("execution", body, Keys.of(self.root, home))

    def _declare(self, name: str, deps: list[str], params: list[str], outs: list[str]) -> None:
        metrics = [out for out in outs if out.startswith("data/metrics/")]
        block = {
            "cmd": "true",
            "deps": deps,
            "params": params,
            "outs": [*(out for out in outs if out not in metrics), f"data/receipts/{name}.json"],
            **({"metrics": metrics} if metrics else {}),
        }
        base, _, item = name.partition("@")
        if not item:
            self.declared[base] = block
            return
        # DVC has no literal names with '@'; a list with one template per item gives the same names.
        self.declared.setdefault(base, {"foreach": {}, "do": {}})
        entry = self.declared[base]
        values = {f"d{i}": dep for i, dep in enumerate(deps)} | {f"o{i}": o for i, o in enumerate(block["outs"])}
        values |= {f"m{i}": m for i, m in enumerate(metrics)}
        entry["foreach"][item] = values
        entry["do"] = {
            "cmd": "true",
            "deps": [f"${{item.d{i}}}" for i in range(len(deps))],
            "params": params,
            "outs": [f"${{item.o{i}}}" for i in range(len(block["outs"]))],
            **({"metrics": ["${item.m0}"]} if metrics else {}),
        }

    def finish(self) -> None:
        """Writes ``dvc.yaml`` and lets DVC itself write ``dvc.lock`` and its cache."""
        from dvc.repo import Repo

        (self.root / "dvc.yaml").write_text(yaml.safe_dump({"stages": self.declared}), encoding="utf-8")
        with contextlib.chdir(self.root), Repo.init(str(self.root), no_scm=True) as repo:
            with repo.config.edit() as config:
                config["core"]["analytics"] = False
            repo.commit(force=True)
