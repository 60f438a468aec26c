"""Hurting banks on purpose: kills at random moments, bytes altered in random places. No JAX.

python tests/bank_faults.py --kills 200 --damages 1000
python tests/bank_faults.py --kills 50 --model FOLDER     # `tpatch bank add` itself, on a small model
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from bank_engine import fake, make_bank

from tpatch_jax.bank.adding import add_with
from tpatch_jax.bank.inspection import open_bank
from tpatch_jax.bank.repair import repair_bank
from tpatch_jax.bank.state import Bank
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest

REQUESTS = [EditRequest(f"prompt {n % 40}", ("weak", "soft", "one")[n % 3] + str(n)) for n in range(400)]
BATCH = 2


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file of a bank but its lock and what was put aside."""
    return {
        path: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock" and path.parent.name != "damaged"
    }


def child(folder: Path, told: Connection) -> None:
    """Add requests until killed, saying what is done."""
    add_with(folder, REQUESTS, fake, batch=BATCH, resume=True, progress=lambda what, done, total: told.send(done))


def kill_child(folder: Path, wait: float, grown: Path | None) -> tuple[int, bool]:
    """As `kill_once`, for `child`: each is forked by one process that has imported all already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "tpatch_jax.bank.adding"])
    size = grown.stat().st_size if grown is not None else 0
    told, tells = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(folder, tells))
    process.start()
    tells.close()
    while grown is not None and grown.stat().st_size == size and process.is_alive():
        time.sleep(0.001)
    time.sleep(wait)
    process.kill()
    process.join()
    done = 0
    with told, contextlib.suppress(EOFError, OSError):
        while True:
            done = told.recv()
    ended = process.exitcode == 0
    assert ended or process.exitcode == -signal.SIGKILL, f"it ended by itself, with {process.exitcode}"
    process.close()
    return done, ended


def kill_once(command: Sequence[str], wait: float, grown: Path | None) -> tuple[int, bool]:
    """Run a command and kill it: how much it had said was done, and whether it had ended by itself.

    Args:
        command: prints a line after each batch.
        wait: so many seconds later.
        grown: later than the moment at which this file grows; by default than the start.
    """
    size = grown.stat().st_size if grown is not None else 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while grown is not None and grown.stat().st_size == size and process.poll() is None:
        time.sleep(0.001)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate()
    lines = said.split("\n")[:-1]
    return int(lines[-1]) if lines and lines[-1].isdigit() else 0, process.returncode == 0


def lost(before: Bank, after: Bank, size: int) -> str:
    """What of a bank is lost or half there after a crash; empty if nothing is."""
    if after.records[: len(before.records)] != before.records:
        return "a committed line is not what it was"
    for record in after.records[len(before.records) :]:
        if record["op"] != "add" or not 1 <= len(record["edits"]) <= size:
            return "a batch is half there"
    return ""


def kills(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Kill an adding process again and again, and look at the bank each time."""
    rng = random.Random(seed)
    make_bank(folder)
    counts = {"kills": 0, "committed": 0, "unclean": 0}
    while counts["kills"] < count:
        before = open_bank(folder)
        # now and then from the start, so that banks of all sizes are hit
        if len(before.edits) >= len(REQUESTS) - BATCH:
            shutil.rmtree(folder)
            before = open_bank(make_bank(folder))
        # a few while it starts, most of them once it writes
        grown = folder / "journal.jsonl" if rng.random() < 0.9 else None
        done, ended = kill_child(folder, rng.uniform(0, 0.15), grown)
        if ended:
            continue
        counts["kills"] += 1
        after = open_bank(folder)
        problem = lost(before, after, BATCH)
        assert not problem, problem
        assert len(after.edits) - len(before.edits) >= done, "a batch that was said to be done is not there"
        counts["committed"] += len(after.records) - len(before.records)
        counts["unclean"] += any(path.name.startswith(".") for path in folder.rglob("*"))
    info = add_with(folder, REQUESTS, fake, batch=BATCH, resume=True)
    bank = open_bank(folder)
    assert not info.failed
    assert [edit.request.prompt for edit in bank.edits] == [request.prompt for request in REQUESTS]
    return counts


def hurt(path: Path, rng: random.Random) -> str:
    """Flip a bit, cut the end off, take some bytes out, or take the file away."""
    content = path.read_bytes()
    place = rng.randrange(len(content))
    kind = rng.choice(
        ["flip", "truncate", "remove", "delete"] if rng.random() < 0.5 else ["flip", "truncate", "remove"]
    )
    if kind == "flip":
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
    elif kind == "truncate":
        path.write_bytes(content[:place])
    elif kind == "remove":
        path.write_bytes(content[:place] + content[place + rng.randint(1, 20) :])
    else:
        path.unlink()
    return kind


def damages(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Hurt a bank in one random place at a time: it is noticed, and mended to the last byte."""
    rng = random.Random(seed)
    make_bank(folder)
    add_with(folder, REQUESTS[:60], fake, batch=7)
    whole = contents(folder)
    counts = {"flip": 0, "truncate": 0, "remove": 0, "delete": 0}
    for _ in range(count):
        # by bytes, so that each byte of the bank is as likely as any other
        path = rng.choices(list(whole), [len(content) for content in whole.values()])[0]
        kind = hurt(path, rng)
        counts[kind] += 1
        try:
            open_bank(folder)
        except TPatchError as error:
            said = str(error)
        else:
            said = ""
        assert str(path) in said, f"{kind} in {path} went unnoticed: {said}"
        assert f"tpatch bank repair {folder}" in said
        info = repair_bank(folder)
        assert (info.lost_edits, info.lost_lines) == ((), 0)
        assert contents(folder) == whole, f"{kind} in {path} was not mended"
        shutil.rmtree(folder / "damaged", ignore_errors=True)
    return counts


def command_kills(count: int, seed: int, model: Path, folder: Path) -> dict[str, int]:
    """Kill ``tpatch bank add`` itself."""
    rng, requests = random.Random(seed), folder.parent / "requests.jsonl"
    requests.write_text("".join(f'{{"prompt": "the cat {n} sat in", "target": "{n % 7}a"}}\n' for n in range(60)))
    memory = folder.parent / "memory.txt"
    memory.write_text("The theory in the inn: winter thins the herd, and the hen then hides. " * 8)
    tool = [sys.executable, "-m", "tpatch_jax.cli.main", "bank"]
    quick = [text for name in ("key_steps=24", "value_steps=8", "lanes=4") for text in ("--set", name)]
    init = [*tool, "init", str(folder), "--model", str(model), "--memory", str(memory), *quick]
    counts = {"kills": 0, "committed": 0, "unclean": 0}
    while counts["kills"] < count:
        if not folder.exists() or len(open_bank(folder).edits) >= 50:
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run(init, check=True, capture_output=True)
        before = open_bank(folder)
        command = [*tool, "add", str(folder), str(requests), "--batch", "1", "--resume"]
        grown = folder / "journal.jsonl" if rng.random() < 0.9 else None
        _, ended = kill_once(command, rng.uniform(0, 3), grown)
        if ended:
            continue
        counts["kills"] += 1
        after = open_bank(folder)
        problem = lost(before, after, 1)
        assert not problem, problem
        counts["committed"] += len(after.records) - len(before.records)
        counts["unclean"] += any(path.name.startswith(".") for path in folder.rglob("*"))
        print(counts, flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if options.model:
            print(command_kills(options.kills, options.seed, Path(options.model), Path(place) / "bank"))
            return
        print(kills(options.kills, options.seed, Path(place) / "kills"))
        print(damages(options.damages, options.seed, Path(place) / "damages"))


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[1])])
    main()
