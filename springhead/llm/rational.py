"""Rational: fine-tuning on a safety rationale followed by the response.

Zhang, Li, Han, Yao, Cen, Zhao: "Safety is Not Only About Refusal: Reasoning-Enhanced Fine-tuning for Interpretable LLM
Safety", arXiv 2503.05021. The model first writes what a request intends and whom it could harm, then refuses or
answers; one sequence, plain cross-entropy on it, no special system prompt at inference.

Deviations:
1. Base prompts: our authored set (and AdvBench, XSTest, CoCoNot when given) in place of SORRY-Bench, which is gated.
2. The disguises are rules (`mutators`), where SORRY-Bench has a language model rewrite.
3. The split is by base prompt and near-duplicate group; the paper does not say that its variants are kept together.
4. Rationales are put together from written parts (`rationales`); a model's own (self-check under `S_REJ` and `S_COMP`)
   are taken only if a judge and the checks of `fault` accept them. The paper names no filter.
5. The judge looks at the response part alone.
6. Benign prompts may be disguised too (`benign_forms`), so that the disguise by itself is no reason to refuse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from springhead.errors import BadInput
from springhead.lineage.digests import json_digest
from springhead.llm import mutators, rationale, rationales
from springhead.llm.judges import quality
from springhead.llm.judges.refusal import RefusalJudge
from springhead.llm.safety_data import TEST, TRAIN, Base
from springhead.llm.similarity import ngrams
from springhead.llm.textrows import Row, with_row_id

FAMILY = "safety"
RATIONAL, REFUSAL, EVAL = "rational", "refusal-sft", "eval"
NO_BENIGN, ONLY_BENIGN = "rational-no-benign", "rational-only-benign"
METHODS = (RATIONAL, REFUSAL, NO_BENIGN, ONLY_BENIGN)
"""Rational; the control: the same prompts and responses without rationales; the paper's two ablations."""
REFUSE, COMPLY = "refuse", "comply"
TEMPLATE = "template"

S_REJ = (
    "You check a request before you answer it. First write one line that begins with 'Rationale:' and says what the "
    "request intends, whom it could harm, and that you should not help. Then write one line that begins with "
    "'Response:' and declines politely, with the reason and a safe alternative. Never give the harmful details."
)
S_COMP = (
    "You check a request before you answer it. First write one line that begins with 'Rationale:' and says what the "
    "request means, why it is harmless, and that you can answer. Then write one line that begins with 'Response:' and "
    "answers it briefly."
)
_LEAK_WORDS = 6
"""So many words of a system prompt in a row are a leak of it."""
_LONGEST_REFUSAL = 120  # words; what goes on longer explains more than a refusal needs to

Sampler = Callable[[Sequence[tuple[str, str]], int], Sequence[str]]
"""Answers (system prompt, user prompt) pairs; the number of the round is its seed."""


@dataclass(frozen=True)
class Settings:
    """What rows to make."""

    forms: tuple[str, ...] = mutators.TRAINED
    """Forms of the adversarial prompts in training."""
    benign_forms: tuple[str, ...] = (mutators.QUESTION,)
    """Forms of the benign prompts in training."""
    eval_forms: tuple[str, ...] = (*mutators.TRAINED, *mutators.UNSEEN)
    """Forms of the adversarial prompts in evaluation."""
    eval_benign_forms: tuple[str, ...] = (mutators.QUESTION,)
    """Forms of the benign prompts in evaluation."""
    methods: tuple[str, ...] = (RATIONAL, REFUSAL)
    """Training methods to write rows for."""

    def __post_init__(self) -> None:
        for name in ("forms", "benign_forms", "eval_forms", "eval_benign_forms"):
            wrong = sorted(set(getattr(self, name)) - set(mutators.FAMILIES))
            if wrong or not getattr(self, name):
                raise BadInput(
                    f"llm.rational.{name}: unknown or no forms {wrong}; known: {', '.join(mutators.FAMILIES)}"
                )
        trained_unseen = sorted(set(mutators.UNSEEN) & {*self.forms, *self.benign_forms})
        if trained_unseen:
            raise BadInput(f"llm.rational.forms: {', '.join(trained_unseen)} are kept for evaluation; remove them")
        wrong = sorted(set(self.methods) - set(METHODS))
        if wrong or not self.methods:
            raise BadInput(f"llm.rational.methods: unknown or none {wrong}; known: {', '.join(METHODS)}")


@dataclass(frozen=True)
class Sampled:
    """A model's own answer to one of the prompts.

    Attributes:
        text: Rationale and response.
        model: Digest of the model that wrote it.
        decoding: How it was decoded.
    """

    text: str
    model: str
    decoding: Mapping[str, Any]


# -- rows -----------------------------------------------------------------------------------------


def train_rows(goal: Base, settings: Settings, seed: int, sampled: Mapping[str, Sampled] | None = None) -> list[Row]:
    """The training rows of a base prompt, for every method.

    Args:
        goal: A base prompt of the training split. A benign one without a response gives rows only where an answer
            was sampled.
        settings: What rows to make.
        seed: Of the disguises and of the parts of the rationales.
        sampled: Accepted answers of a model by prompt; other prompts get a written one.
    """
    rows: list[Row] = []
    for variant, (form, prompt) in enumerate(forms_of(goal, settings, seed)):
        parts, made = _answer(goal, form, prompt, seed, (sampled or {}).get(prompt))
        if parts is None:
            continue
        texts = {RATIONAL: rationale.joined(*parts), REFUSAL: parts[1]}
        for method in settings.methods:
            benign = goal.kind == "benign"
            if (method == NO_BENIGN and benign) or (method == ONLY_BENIGN and not benign):
                continue
            completion = texts[REFUSAL if method == REFUSAL else RATIONAL]
            rows.append(_row(goal, method, form, variant, prompt, completion) | {"made_by": made})
    return [with_row_id(row) for row in rows]


def forms_of(goal: Base, settings: Settings, seed: int) -> list[tuple[str, str]]:
    """The forms of a training prompt and its texts. A contrast prompt is shown undisguised: it lives by its words."""
    chosen = {"adversarial": settings.forms, "benign": settings.benign_forms, "contrast": (mutators.QUESTION,)}
    return [(form, mutators.mutate(goal.prompt, form, seed)) for form in chosen[goal.kind]]


def eval_rows(goal: Base, settings: Settings, seed: int) -> list[Row]:
    """The evaluation rows of a held-out base prompt, one of each form of its kind."""
    forms = settings.eval_forms if goal.kind == "adversarial" else settings.eval_benign_forms
    made = [(form, mutators.mutate(goal.prompt, form, seed)) for form in forms]
    return [
        with_row_id(_row(goal, EVAL, form, variant, prompt, "") | {"made_by": {"source": TEMPLATE}})
        for variant, (form, prompt) in enumerate(made)
    ]


def sample_prompts(rows: Sequence[Row], counts: Mapping[str, int], seed: int) -> list[Row]:
    """The training rows of some of the prompts, drawn by seed: the same prompts for every method.

    Args:
        rows: Training rows, of one method or several.
        counts: How many prompts of each kind; of a kind that is not named, all.
        seed: Of the draw.

    Raises:
        BadInput: a kind is unknown or its count is negative.
    """
    wrong = sorted({*counts} - {"adversarial", "contrast", "benign"} | {k for k, n in counts.items() if n < 0})
    if wrong:
        raise BadInput(f"prompts: {', '.join(wrong)}: not adversarial, contrast or benign, or a negative number")
    ranked: dict[str, dict[str, None]] = {}
    key_of = {row["id"]: json_digest([seed, row["parents"], row["operator"]]) for row in rows}
    for row in sorted(rows, key=lambda r: key_of[r["id"]]):
        ranked.setdefault(row["kind"], {})[key_of[row["id"]]] = None
    drawn = {key for kind, keys in ranked.items() for key in list(keys)[: counts.get(kind, len(keys))]}
    return [row for row in rows if key_of[row["id"]] in drawn]


def _answer(
    goal: Base, form: str, prompt: str, seed: int, sampled: Sampled | None
) -> tuple[tuple[str, str] | None, dict[str, Any]]:
    """Rationale and response, and who made them."""
    if sampled is not None:
        parts = rationale.split(sampled.text)
        made = {"source": "model", "model": sampled.model, "decoding": dict(sampled.decoding)}
        return (parts.rationale, parts.response), made
    if goal.kind != "benign":
        return rationales.refusal(goal, form, prompt, seed), {"source": TEMPLATE}
    if not goal.response:
        return None, {}
    return (rationales.compliance(goal, prompt, seed), goal.response), {"source": TEMPLATE}


def _row(goal: Base, method: str, form: str, variant: int, prompt: str, completion: str) -> Row:
    return {
        "parents": [goal.id],
        "family": FAMILY,
        "method": method,
        "operator": form,
        "variant": variant,
        "split": TEST if goal.split == TEST else TRAIN,
        "kind": goal.kind,
        "category": goal.category,
        "source": goal.source,
        "group": goal.group,
        "goal": goal.prompt,
        "prompt": prompt,
        "completion": completion,
        "answer": COMPLY if goal.kind == "benign" else REFUSE,
    }


# -- a model's own answers ------------------------------------------------------------------------


def fault(text: str, goal: Base, judge: RefusalJudge) -> str | None:
    """Why a model's answer to a prompt is not taken as training data, or None.

    The judge sees the response part alone. For a prompt that is to be refused, an answer is taken only if it refuses,
    is short and has no list in it, so that nothing harmful is trained on.
    """
    parts = rationale.split(text)
    if parts.fault is not None:
        return f"form: {parts.fault}"
    for system in (S_REJ, S_COMP):
        if not ngrams([system.lower()], _LEAK_WORDS).isdisjoint(ngrams([text.lower()], _LEAK_WORDS)):
            return "leaks the system prompt"
    for name, part in (("rationale", parts.rationale), ("response", parts.response)):
        reason = quality.incoherence(part)
        if reason is not None:
            return f"{name}: {reason}"
    wanted = COMPLY if goal.kind == "benign" else REFUSE
    refused = judge.refuses(goal.prompt, parts.response)
    if refused != (wanted == REFUSE):
        return "the response refuses" if refused else "the response does not refuse"
    if rationale.agrees(parts.rationale, refused) is not True:
        return f"the rationale decides {rationale.verdict(parts.rationale)}"
    if wanted == REFUSE:
        if len(parts.response.split()) > _LONGEST_REFUSAL:
            return "a refusal of too many words"
        if any(line.lstrip()[:2] in ("1.", "- ", "* ", "1)") for line in parts.response.splitlines()):
            return "a refusal with a list"
    return None


def self_check(
    goals: Sequence[Base],
    settings: Settings,
    seed: int,
    sampler: Sampler,
    tries: int,
    judge: RefusalJudge,
    model: str,
    decoding: Mapping[str, Any],
) -> tuple[dict[str, Sampled], dict[str, Any]]:
    """Rejection sampling of a model's own rationales over the prompts of training bases.

    Every prompt is asked up to `tries` times, under S_REJ or S_COMP by its kind, until an answer is accepted.

    Returns:
        The accepted answers by prompt; and the yield: asked, accepted by kind, and refused answers by reason.
    """
    open_: list[tuple[str, Base]] = [(prompt, goal) for goal in goals for _, prompt in forms_of(goal, settings, seed)]
    asked = Counter(goal.kind for _, goal in open_)
    accepted: dict[str, Sampled] = {}
    reasons: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    for attempt in range(tries):
        if not open_:
            break
        pairs = [(S_COMP if goal.kind == "benign" else S_REJ, prompt) for prompt, goal in open_]
        texts = sampler(pairs, attempt)
        left = []
        for (prompt, goal), text in zip(open_, texts, strict=True):
            reason = fault(text, goal, judge)
            if reason is None:
                accepted[prompt] = Sampled(text, model, {**decoding, "attempt": attempt})
                taken[goal.kind] += 1
            else:
                reasons[reason.partition(":")[0]] += 1
                left.append((prompt, goal))
        open_ = left
    share = {kind: {"asked": count, "accepted": taken[kind]} for kind, count in sorted(asked.items())}
    return accepted, {"by_kind": share, "rejected": dict(sorted(reasons.items()))}
