"""Comparing banks, and bringing one up to date from another: a folder, or a repository on the hub.

The journal is one chain, so a bank is either a continuation of another or has parted from it; only the first is
brought over. The segments come first and the lines of the journal last, one by one, as with any other change.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tpatch_jax.bank.commit import commit_line, open_to_write, write_bank
from tpatch_jax.bank.inspection import inspect_bank, open_bank
from tpatch_jax.bank.journal import Line
from tpatch_jax.bank.layout import DAMAGED, LOCK, is_bank, memory_name
from tpatch_jax.bank.lock import writing
from tpatch_jax.bank.segments import segment_paths
from tpatch_jax.bank.state import Bank, states
from tpatch_jax.errors import TPatchError

__all__ = ["BankDifference", "diff_banks", "pull_bank", "push_bank"]

HUB = "hf://"


class BankDifference(NamedTuple):
    """How two banks differ, by prompt.

    Attributes:
        same_model: whether they are for the same model.
        common: how many lines of their journals are the same, from the start.
        only_left: ``(prompt, target)`` of edits that are active in the first alone.
        only_right: the same of the second.
        targets: ``(prompt, target in the first, target in the second)`` where both are active and differ.
        states: ``(prompt, target, state in the first, state in the second)`` of edits whose state differs.
    """

    same_model: bool
    common: int
    only_left: tuple[tuple[str, str], ...]
    only_right: tuple[tuple[str, str], ...]
    targets: tuple[tuple[str, str, str], ...]
    states: tuple[tuple[str, str, str, str], ...]


def diff_banks(left: str | Path, right: str | Path) -> BankDifference:
    """Compare what two banks hold.

    Args:
        left: a bank.
        right: another.

    Raises:
        TPatchError: one of them is missing or damaged.

    Example:
        >>> diff_banks("banks/facts", "banks/colleague").only_right  # doctest: +SKIP
        (('The capital of France is', 'Lyon'),)
    """
    banks = open_bank(left), open_bank(right)
    common = _common(*(list(bank.records) for bank in banks))
    active: list[dict[str, tuple[str, str]]] = []
    known: list[dict[tuple[str, str], str]] = []
    for bank in banks:
        state_of = states(bank)
        active.append({})
        known.append({})
        for edit in bank.edits:
            key = edit.key
            known[-1][key, edit.request.target.strip()] = state_of[edit.id]
            if state_of[edit.id] == "active":
                active[-1][key] = edit.request.prompt, edit.request.target
    one, other = active
    both = [
        (one[key][0], one[key][1], other[key][1])
        for key in one
        if key in other and one[key][1].strip() != other[key][1].strip()
    ]
    moved = [
        (*key, known[0][key], known[1][key]) for key in known[0] if key in known[1] and known[0][key] != known[1][key]
    ]
    return BankDifference(
        banks[0].manifest["model"]["fingerprint"] == banks[1].manifest["model"]["fingerprint"],
        common,
        tuple(one[key] for key in one if key not in other),
        tuple(other[key] for key in other if key not in one),
        tuple(both),
        tuple(moved),
    )


def _common(left: list[Any], right: list[Any]) -> int:
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


def pull_bank(folder: str | Path, source: str | Path) -> int:
    """Bring a bank up to date from another one, or make it if it does not exist.

    Args:
        folder: the bank to bring up to date.
        source: a bank's folder, or ``hf://owner/name``, a repository of the hub that `push_bank` wrote.

    Returns:
        How many lines the journal grew.

    Raises:
        TPatchError: one of them is damaged, they have parted, or the hub cannot be reached.

    Example:
        >>> pull_bank("banks/facts", "/mnt/team/facts")  # doctest: +SKIP
        3
    """
    with _fetched(source) as place:
        return _bring(place, Path(folder), f"{folder} and {source}")


def push_bank(folder: str | Path, target: str | Path) -> int:
    """Bring another bank up to date from this one, or make it if it does not exist.

    Args:
        folder: a bank.
        target: a folder, or ``hf://owner/name``, a repository of the hub.

    Returns:
        How many lines the other journal grew.

    Raises:
        TPatchError: one of them is damaged, they have parted, or the hub cannot be reached.

    Example:
        >>> push_bank("banks/facts", "/mnt/team/facts")  # doctest: +SKIP
        3
    """
    if not str(target).startswith(HUB):
        return _bring(Path(folder), Path(target), f"{folder} and {target}")
    with tempfile.TemporaryDirectory() as temporary:
        there = Path(temporary) / "bank"
        at = _download(str(target), there)
        known = is_bank(there)
        if not known:
            # A new repository has a file or two of the hub's own.
            shutil.rmtree(there, ignore_errors=True)
        grown = _bring(Path(folder), there, f"{folder} and {target}")
        if grown or not known:
            _upload(there, str(target), at)
        return grown


def _bring(source: Path, target: Path, both: str) -> int:
    bank, lines = _read(source)
    if target.exists() and not target.is_dir():
        raise TPatchError(f"{target} is a file; give the folder of a bank, or a new name")
    created = not target.exists() or not any(target.iterdir())
    if created:
        manifest = {name: value for name, value in bank.manifest.items() if name not in ("check", "memory")}
        memory = source / memory_name(manifest)
        write_bank(target, manifest, memory.read_bytes() if bank.manifest.get("memory") else None)
    with writing(target):
        there = open_to_write(target)
        if there.manifest["check"] != bank.manifest["check"]:
            raise TPatchError(f"{both} are banks of different models or settings; add the requests of one to the other")
        _, old = _read(target)
        common = _common([line.check for line in lines], [line.check for line in old])
        if common < min(len(lines), len(old)):
            raise TPatchError(
                f"{both} have parted after line {common} of their journals; `tpatch bank diff` shows what differs: "
                "add the requests that one lacks to the other"
            )
        for line in lines[len(old) :]:
            segment = line.record.get("segment")
            content = None
            if segment and segment_paths(source, segment)[0].exists():
                content = segment_paths(source, segment)[0].read_bytes()
            there = commit_line(there, line, content)
        return max(0, len(lines) - len(old))


def _read(folder: Path) -> tuple[Bank, tuple[Line, ...]]:
    bank = open_bank(folder)
    return bank, inspect_bank(folder).lines


@contextmanager
def _fetched(source: str | Path) -> Iterator[Path]:
    if not str(source).startswith(HUB):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory() as temporary:
        there = Path(temporary) / "bank"
        if _download(str(source), there) is None:
            raise TPatchError(f"{source} does not exist; check the name, the connection and `hf auth login`")
        if not is_bank(there):
            raise TPatchError(f"{source} holds no bank; `tpatch bank push` puts one there")
        yield there


CHANGED = 412
"""What the hub answers where a repository is no longer at the commit that was named."""


def _hub(what: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    # the hub's client raises the errors of its transport, which change with its version
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) == CHANGED:
            raise TPatchError(f"{what}: somebody else did meanwhile; push again, on top of that") from error
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise TPatchError(f"{what}: {reason}; check the name, the connection and `hf auth login`") from error


def _download(address: str, folder: Path) -> str | None:
    """Fetch a repository and tell at which commit it is; ``None`` if it does not exist."""
    import huggingface_hub

    name = address.removeprefix(HUB)
    api = huggingface_hub.HfApi()
    if not _hub(f"cannot look for {address}", lambda: api.repo_exists(name)):
        return None
    at = _hub(f"cannot fetch {address}", lambda: api.repo_info(name).sha)
    _hub(f"cannot fetch {address}", lambda: api.snapshot_download(name, revision=at, local_dir=folder))
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return at


def _upload(folder: Path, address: str, at: str | None) -> None:
    """Put a bank in place of what the repository had at a commit; a repository that went on since then refuses."""
    import huggingface_hub

    name = address.removeprefix(HUB)
    api = huggingface_hub.HfApi()
    if at is None:
        _hub(f"cannot make {address}", lambda: api.create_repo(name, private=True))
    _hub(
        f"cannot push to {address}",
        lambda: api.upload_folder(
            repo_id=name,
            folder_path=folder,
            ignore_patterns=[LOCK, f"{DAMAGED}/*"],
            commit_message="tpatch bank push",
            parent_commit=at,
        ),
    )
