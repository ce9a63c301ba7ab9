"""The signed head of the ledger: how long it is and how it ends, so that a cut is noticed.

The chain finds a line that was changed, removed or moved, but a ledger whose last lines are gone is
still a whole chain. The head is signed after every append, in a file of its own, and promotions carry it
into the registry as well, so that putting back an old ledger together with its old head is noticed too.
"""

from dataclasses import dataclass

from springhead.errors import BadInput, Finding
from springhead.jsonio import write_json_atomic
from springhead.keys import Keys
from springhead.lineage.ledger import Ledger

FILE = "ledger.head.json"
_KIND = "application/vnd.springhead.ledger-head+json"


@dataclass(frozen=True)
class HeadState:
    """What the signed head says about the ledger.

    Attributes:
        problem: what is wrong, or an empty string.
        signed: entries that the head vouches for.
        unsigned: entries that were appended after it.
    """

    problem: str
    signed: int
    unsigned: int


def check_head(ledger: Ledger, keys: Keys) -> HeadState:
    """Compares the ledger with its signed head.

    Raises:
        BadInput: if a trusted key cannot be read.
    """
    from springhead import signing

    path, digests = ledger.path.with_name(FILE), ledger.digests()
    broken = ledger.verify()
    if broken:
        return HeadState(broken[0], 0, len(digests))
    if not path.is_file():
        missing = f"{path.name} is missing: nothing vouches for the end of the ledger" if digests else ""
        return HeadState(missing, 0, len(digests))
    try:
        head = signing.opened(path, _KIND, keys)
        entries, digest = int(head["entries"]), str(head["head"])
    except (Finding, BadInput, KeyError, TypeError, ValueError) as error:
        return HeadState(str(error), 0, len(digests))
    if len(digests) < entries:
        lost = entries - len(digests)
        what = f"was cut: {entries} entries were signed, {len(digests)} are left ({lost} lost at the end)"
        return HeadState(what, len(digests), 0)
    if digests[entries - 1] != digest:
        return HeadState(f"its first {entries} lines are not those that were signed", 0, len(digests))
    return HeadState("", entries, len(digests) - entries)


def sign_head(ledger: Ledger, keys: Keys, accept: bool = False) -> None:
    """Signs the ledger as it ends now; the caller holds its lock.

    Entries that were not signed when they were made are not signed by the way: whoever can write to the
    file could otherwise have the next stage sign theirs. An external signer is asked for promotions
    only, so with one, executions are signed late, but never a promotion.

    Args:
        ledger: the ledger.
        keys: the keys of the checkout.
        accept: sign also where the ledger does not fit its old head, because a person looked at it.

    Raises:
        Finding: if the ledger was cut or changed before its old head, which a new one would hide, or
            holds entries that were not signed when they were made.
        BadInput: if the key cannot be used.
    """
    from springhead import signing

    entries, head = ledger.extent()
    state = check_head(ledger, keys)
    first = entries <= 1 and not ledger.path.with_name(FILE).is_file()
    if state.problem and not first and not accept:
        raise Finding(f"{ledger.path}: {state.problem}; see `springhead audit`")
    between = ledger.entries()[state.signed : entries - 1]
    if not accept and any(entry["kind"] == "promotion" for entry in between):
        raise Finding(f"{ledger.path}: holds a promotion that nobody signed; see `springhead audit`")
    if not accept and between and not keys.external:
        raise Finding(
            f"{ledger.path}: {len(between)} entries were not signed when they were made; once you know why, "
            "`springhead doctor --sign-ledger` lists and signs them"
        )
    if entries:
        value = {"entries": entries, "head": head}
        write_json_atomic(ledger.path.with_name(FILE), signing.envelope(value, _KIND, keys))
