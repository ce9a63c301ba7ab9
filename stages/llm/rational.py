"""Make Rational's rows: base prompts, their disguises, rationales and responses; and what is held out.

Writes `bases.jsonl` (every base prompt with its split), `train.jsonl` with the rows of every method, `eval.jsonl` with
every form of the held-out prompts, `rows.parquet`, and `yield.csv`: how many prompts of each kind and form got a
written answer, an answer of the student's own that was accepted, or none.

Without public sets the authored prompts alone are used. A public benign prompt is dropped, and counted in the metrics,
if its answer refuses, or if either looks foreign or holds personal data. With `self_check.tries` above 0 the student is
asked for its own rationales first (rejection sampling); what it writes acceptably replaces the written answer.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from springhead.errors import BadInput
from springhead.jsonio import write_jsonl
from springhead.lineage.digests import json_digest, tree_digest
from springhead.llm import asking, generation, language, personal, publicsets, rational, safety_data, students
from springhead.llm.judges import refusal
from springhead.llm.judges.refusal import RefusalJudge
from springhead.llm.safety_data import TEST, TRAIN, Base
from springhead.llm.textrows import Row, write_rows
from springhead.stage import Stage, run_stage
from springhead.tables import write_csv

Yield = tuple[str, str, int, int, int]
"""Kind, form, and the prompts with a written answer, with one of the student's own, and with none."""
YIELD = ("kind", "form", "written", "sampled", "none")
"""The columns of `yield.csv`."""
UNFIT = ("refuses", "foreign", "personal")
"""Why a public benign prompt is dropped: its answer refuses, or prompt or answer look foreign or personal."""


@dataclass(frozen=True)
class SelfCheck:
    """How the student is asked for its own rationales."""

    tries: int
    """How often each prompt is asked until an answer is accepted; 0 asks none."""
    max_prompts: int
    """Ask the training prompts of so many base prompts of each kind; 0 for all."""
    max_new_tokens: int
    """Longest answer in tokens."""
    batch_rows: int
    """Prompts answered together."""
    temperature: float
    """Of the sampling; at 0 every try gives the same answer."""
    top_p: float
    """Of the sampling."""
    device: students.Device
    """cpu, cuda or auto. Only the CPU promises equal bytes."""

    def __post_init__(self) -> None:
        if self.tries < 0 or self.max_prompts < 0:
            raise BadInput("llm.rational.self_check: tries and max_prompts must not be negative")

    def decoding(self, seed: int) -> generation.Decoding:
        """The same as settings of the decoder."""
        return generation.Decoding(self.max_new_tokens, self.batch_rows, self.temperature, self.top_p, seed)


@dataclass(frozen=True)
class Params:
    """Parameters `llm.rational`."""

    public: tuple[str, ...]
    """Public sets to take base prompts from, beside the authored ones: advbench, xstest, coconot. Their files must be
    there, see `docs/methods/rational.md`."""
    contrast: bool
    """Whether to evaluate over-refusal on CoCoNot's 379 contrast prompts too; their file must be there."""
    harmbench: bool
    """Whether to evaluate attacks on HarmBench's 41 standard behaviours too; their file must be there."""
    similarity: float
    """Base prompts this similar are near-duplicates and on one side of the split (Jaccard of words, 0..1)."""
    test_share: float
    """Share of the base prompts of each kind, source and category that is held out."""
    forms: tuple[str, ...]
    """Forms of the adversarial training prompts; see `springhead.llm.mutators`."""
    benign_forms: tuple[str, ...]
    """Forms of the benign training prompts."""
    eval_forms: tuple[str, ...]
    """Forms of the adversarial evaluation prompts."""
    eval_benign_forms: tuple[str, ...]
    """Forms of the benign evaluation prompts."""
    methods: tuple[str, ...]
    """Methods to write training rows for: rational, refusal-sft, rational-no-benign, rational-only-benign."""
    self_check: SelfCheck
    """The student's own rationales."""

    def __post_init__(self) -> None:
        if not 0.0 < self.similarity <= 1.0:
            raise BadInput("llm.rational.similarity must be above 0 and at most 1")

    def settings(self) -> rational.Settings:
        """What rows to make."""
        return rational.Settings(
            self.forms, self.benign_forms, self.eval_forms, self.eval_benign_forms, methods=self.methods
        )


@dataclass(frozen=True)
class Prompts:
    """The base prompts with group and split, and how many were dropped."""

    bases: list[Base]
    leaks: int
    """Dropped because a training prompt of their group is near one that is kept for evaluation."""
    unfit: dict[str, int]
    """Public benign prompts dropped, by reason."""


def unfit_answer(goal: Base, judge: RefusalJudge) -> str | None:
    """The reason, one of `UNFIT`, why a benign prompt and its answer cannot be trained on; None if they can."""
    if judge.refuses(goal.prompt, goal.response):
        return "refuses"
    texts = (goal.prompt, goal.response)
    if any(map(language.foreign, texts)):
        return "foreign"
    return "personal" if any(map(personal.found, texts)) else None


def base_prompts(params: Params, root: Path, seed: int) -> Prompts:
    """The authored prompts and those of the public sets that are asked for.

    Raises:
        BadInput: a public set is unknown or its file is missing.
    """
    contrast = publicsets.coconot_contrast(root) if params.contrast else []
    attacks = publicsets.harmbench_behaviours(root) if params.harmbench else []
    judge, unfit = refusal.shipped(), Counter(dict.fromkeys(UNFIT, 0))
    found = safety_data.authored()
    for base in safety_data.public(params.public, root):
        reason = unfit_answer(base, judge) if base.kind == "benign" else None
        if reason is None:
            found.append(base)
        else:
            unfit[reason] += 1
    placed = safety_data.split(safety_data.grouped(found, params.similarity), params.test_share, seed)
    # Near-duplicates of one prompt need not be near each other, so two groups may still touch across the split.
    held = [b.prompt for b in placed if b.split == TEST and b.kind != "contrast"]
    held += [prompt for _, prompt in (*contrast, *attacks)]
    kept, leaks = safety_data.without_leaks(placed, held, params.similarity)
    kept += safety_data.contrast_bases(contrast) + safety_data.attack_bases(attacks)
    return Prompts(kept, leaks, dict(unfit))


def sampled_answers(
    stage: Stage[Params], training: Sequence[Base], settings: rational.Settings
) -> tuple[dict[str, rational.Sampled], dict[str, Any]]:
    """The student's own accepted answers by prompt, and the counts of `rational.self_check`."""
    check = stage.params.self_check
    if not check.tries:
        return {}, {}
    source = stage.input("students")
    seen: Counter[str] = Counter()
    asked = []
    for goal in training:
        if not check.max_prompts or seen[goal.kind] < check.max_prompts:
            seen[goal.kind] += 1
            asked.append(goal)
    model, tokenizer = students.load_to_ask(source, check.device)
    decoding, digest = check.decoding(stage.seed), tree_digest(source)
    sampler = model_sampler(model, tokenizer, decoding, digest, stage.scratch)
    facts = {k: value for k, value in asking.described(model, decoding).items() if k not in ("batch_rows", "stop")}
    return rational.self_check(asked, settings, stage.seed, sampler, check.tries, refusal.shipped(), digest, facts)


def model_sampler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoding: generation.Decoding,
    digest: str,
    scratch: Path,
) -> rational.Sampler:
    """The sampler that asks a model here; what a killed run answered is in `scratch` and is not asked again.

    A prompt's draws depend on the prompt and the round, not on its batch. Equal prompts of a round are asked once.
    """

    def sample(pairs: Sequence[tuple[str, str]], attempt: int) -> list[str]:
        ids = [json_digest([attempt, *pair]) for pair in pairs]
        rows = {
            name: {"id": name, "messages": [{"role": "system", "content": s}, {"role": "user", "content": prompt}]}
            for name, (s, prompt) in zip(ids, pairs, strict=True)
        }
        folder = scratch / f"self-check-{json_digest(list(rows))[:16]}"
        texts = asking.ask(list(rows.values()), model, tokenizer, decoding, digest, folder)
        by_id = dict(zip(rows, texts, strict=True))
        return [by_id[name] for name in ids]

    return sample


def yields(
    training: Sequence[Base], settings: rational.Settings, seed: int, rows: Sequence[Mapping[str, Any]]
) -> list[Yield]:
    """How many prompts of each kind and form got which answer, by kind and form."""
    made = {(row["parents"][0], row["operator"]): row["made_by"]["source"] for row in rows}
    counts: dict[tuple[str, str], Counter[str]] = {}
    for goal in training:
        for form, _ in rational.forms_of(goal, settings, seed):
            counts.setdefault((goal.kind, form), Counter())[made.get((goal.id, form), "none")] += 1
    return [(kind, form, c[rational.TEMPLATE], c["model"], c["none"]) for (kind, form), c in sorted(counts.items())]


def figures(
    bases: Sequence[Base], train: Sequence[Row], evaluation: Sequence[Row], lines: Sequence[Yield]
) -> dict[str, Any]:
    """Base prompts by split and kind, rows by method and kind, and who wrote the answers."""
    splits = {side: Counter(b.kind for b in bases if b.split == side) for side in (TRAIN, TEST)}
    methods = sorted({row["method"] for row in train})
    return {
        "bases": {side: dict(sorted(found.items())) for side, found in splits.items()},
        "train": {m: dict(sorted(Counter(r["kind"] for r in train if r["method"] == m).items())) for m in methods},
        "eval": dict(sorted(Counter(row["kind"] for row in evaluation).items())),
        "answers": {name: sum(line[YIELD.index(name)] for line in lines) for name in YIELD[2:]},
    }


def run(stage: Stage[Params]) -> None:
    """Gather base prompts, split them, write their rows."""
    settings = stage.params.settings()
    prompts = base_prompts(stage.params, stage.root, stage.seed)
    bases = prompts.bases
    training = [b for b in bases if b.split == TRAIN]
    sampled, counted = sampled_answers(stage, training, settings)
    train: list[Row] = []
    evaluation: list[Row] = []
    with stage.progress(len(bases), unit="prompts") as bar:
        for base in bases:
            if base.split == TRAIN:
                train += rational.train_rows(base, settings, stage.seed, sampled)
            elif base.kind != "contrast":
                evaluation += rational.eval_rows(base, settings, stage.seed)
            bar.advance()
    lines = yields(training, settings, stage.seed, train)
    write_jsonl(stage.out / "bases.jsonl", [asdict(b) for b in bases])
    write_rows(stage.out, {"train.jsonl": train, "eval.jsonl": evaluation})
    write_csv(stage.out / "yield.csv", [dict(zip(YIELD, line, strict=True)) for line in lines])
    stage.dataset(stage.out / "train.jsonl", "safety-rows-train", len(train), "output")
    stage.dataset(stage.out / "eval.jsonl", "safety-rows-eval", len(evaluation), "output")
    dropped = {"leaks_dropped": prompts.leaks, "unfit_dropped": prompts.unfit}
    stage.metrics({**figures(bases, train, evaluation, lines), **dropped, "self_check": counted})


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
