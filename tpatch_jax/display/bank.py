"""What a bank holds, as tables and pictures. Its model is not needed: keys and queries are in the bank."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from tpatch_jax.bank.assembly import Held, Store, assemble
from tpatch_jax.bank.state import SAID, SAID_UNDER_TARGET, Bank, active, replay, states
from tpatch_jax.display.charts import heat, histogram, steps
from tpatch_jax.display.console import format_count
from tpatch_jax.display.markup import Child, element, figures, number, shorten, table

__all__ = ["bank_summary", "bank_title", "bank_view", "cross_activations"]

MOST_EDITS, MOST_LINES, MOST_CELLS, MOST_STEPS = 1000, 200, 48, 60
FEW = 5
"""Fewer margins or edits make no picture."""
ORDER = ("active", "superseded", "disabled", "removed", "lost")


def bank_title(bank: Bank) -> str:
    """What the bank is, in one line."""
    edits = format_count(len(bank.edits), "edit")
    return f"Bank {bank.folder.resolve().name}: {edits} of {bank.manifest['model']['name']}"


def bank_summary(bank: Bank) -> dict[str, Any]:
    """How many edits are in which state, and how many guards and lines there are."""
    counts = Counter(states(bank).values())
    return {
        "edits": len(bank.edits),
        **{state: counts[state] for state in ORDER if counts[state] or state == "active"},
        "guards": len(bank.guards),
        "journal lines": len(bank.records),
    }


def cross_activations(held: Held, layers: int) -> np.ndarray:
    """How strongly each edit's neurons fire on each edit: the strongest ``max(0, q·k + b)``.

    The queries are those that the bank remembers of each edit: at its target tokens in the last layer, and at all
    tokens in the layer of the subject site.

    Args:
        held: edits with their neurons.
        layers: how many layers the model has.

    Returns:
        ``[edits, edits]``: neurons of the row's edit, queries of the column's.
    """
    count, width = len(held.edits), held.neurons["key"].shape[1]
    layer, responses = held.neurons["layer"], np.zeros((count, count))
    deep = (layer >= 0) & (layer != layers - 1)
    for column, piece in enumerate(held.pieces):
        for name, chosen in (("earlier_query", np.flatnonzero(~deep)), ("earlier_heard", np.flatnonzero(deep))):
            queries = piece[name].reshape(-1, width).astype(np.float32)
            if len(queries) and len(chosen):
                z = queries @ held.neurons["key"][chosen].T + held.neurons["bias"][chosen]
                np.maximum.at(responses[:, column], held.owner[chosen], z.max(0))
    return responses


def _pictures(bank: Bank) -> list[Element]:
    lines, drawn = len(bank.records), []
    if lines:
        seals = [(record, str(record.get("check", ""))) for record in bank.records]
        chosen = sorted({round(at) for at in np.linspace(0, lines, min(lines + 1, MOST_STEPS))})
        points = [(n, len(active(replay(bank.folder, bank.manifest, seals[:n])))) for n in chosen]
        drawn.append(steps("Active edits", points, "line of the journal", "active edits"))
    edits = active(bank)
    margins = [float(edit.evidence["margin"]) for edit in edits if edit.evidence.get("margin") is not None]
    if len(margins) >= FEW:
        drawn.append(histogram("Margins of the active edits", margins, "margin"))
    if len(edits) >= FEW:
        held = assemble(bank, edits[-MOST_CELLS:], Store.new())
        values = cross_activations(held, bank.manifest["model"]["layers"])
        firing = int(np.sum(np.diag(values) > 0))
        other = int(np.sum((values > 0) & ~np.eye(len(values), dtype=bool)))
        title = "Strongest activation of each edit's neurons on each edit"
        title += f", the latest {len(values)}" * (len(edits) > len(values))
        idle = len(values) - len(set(held.owner.tolist()))
        described = f"{firing} of {len(values)} edits fire on their own queries" + f", {idle} need no neuron" * bool(
            idle
        )
        described += f"; {other} times one fires on another's"
        drawn.append(heat(title, values, described, ("neurons of edit", "queries of edit")))
        drawn[-1].append(element("figcaption", f"{described}. {_norms(held)}"))
    return drawn


def _norms(held: Held) -> str:
    key, value = (np.linalg.norm(held.neurons[name], axis=1) for name in ("key", "value"))
    if not len(key):
        return "They need no neuron."
    middle = [number(float(np.median(norms))) for norms in (key, value)]
    return f"{len(key)} neurons; the median norm of their keys is {middle[0]}, of their values {middle[1]}."


def _losses(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in losses.items())


def _edits(bank: Bank) -> list[Child]:
    state_of = states(bank)
    rows = []
    for edit in reversed(bank.edits[-MOST_EDITS:]):
        evidence, state = edit.evidence, state_of[edit.id]
        said = evidence.get(SAID)
        rows.append(
            [
                edit.id,
                element("td", state, class_="good" if state == "active" else None),
                edit.request.prompt,
                edit.request.target,
                shorten(str(said).strip()) if said is not None else "",
                "held already" if evidence.get("status") == "already" else str(evidence.get("site", "")),
                number(len(edit.fits[-1][1]) if edit.fits else 0),
                number(evidence.get("margin")),
                _losses(evidence.get("losses") or {}),
                number(edit.added),
            ]
        )
    columns = ["id", "state", "prompt", "target", "said before", "site", "neurons", "margin", "losses", "line"]
    left = len(bank.edits) - len(rows)
    return [
        element("h2", "Edits"),
        element("p", "Newest first; the line is that of the journal that added it."),
        table(columns, rows, numbers=("neurons", "margin", "line")),
        element("p", "What an earlier version kept as said before was no such thing, and is left out.", class_="faint")
        if any(edit.evidence.get(SAID_UNDER_TARGET) is not None for edit in bank.edits)
        else None,
        element("p", f"{left:,} earlier ones are left out; tpatch bank list shows all.") if left else None,
    ]


def _log(records: Sequence[Mapping[str, Any]]) -> list[Child]:
    rows = []
    for record in records[::-1][:MOST_LINES]:
        named = [entry["id"] for entry in record.get("edits", ())] or list(record.get("ids", ()))
        named = named or [entry["prompt"] for entry in record.get("guards", ())]
        keys = ("superseded", "refitted", "gave_way", "failed", "broken")
        more = [f"{len(record[key])} {key.replace('_', ' ')}" for key in keys if record.get(key)]
        what = shorten(", ".join(named), 160)
        cells = [record["time"].replace("T", " ").removesuffix("+00:00"), record["who"], record["op"], what]
        rows.append([number(record["n"]), *cells, ", ".join(more), number(record.get("seconds"))])
    left = len(records) - len(rows)
    return [
        element("h2", "Journal"),
        element("p", "Newest first; times are UTC."),
        table(["line", "time", "who", "change", "what", "and", "seconds"], rows, numbers=("line", "seconds")),
        element("p", f"{left:,} earlier lines are left out; tpatch bank log shows all.") if left else None,
    ]


def bank_view(bank: Bank) -> list[Child]:
    """All there is to see of a bank.

    Args:
        bank: as `tpatch_jax.bank.inspection.open_bank` reads it.

    Returns:
        What follows the title: figures, pictures, edits, guards and the journal.
    """
    model, counts = bank.manifest["model"], bank_summary(bank)
    settings = ", ".join(f"{name} = {value}" for name, value in bank.manifest["settings"].items())
    about = f"{model['family']}, {model['layers']} layers of width {model['width']}, {model['dtype']}; preset "
    about += bank.manifest["preset"] + (f", {settings}" if settings else "") + f". Model {model['fingerprint']}"
    about += f", last seal {bank.check[:16]}."
    parts: list[Child] = [
        element("p", about, class_="faint"),
        figures({name: number(value) for name, value in counts.items()}),
        element("div", *_pictures(bank), class_="pictures"),
    ]
    if bank.edits:
        parts += _edits(bank)
    if bank.guards:
        parts += [
            element("h2", "Guarded answers"),
            element("p", "What the model must go on saying."),
            table(["prompt", "answer"], [[guard.prompt, guard.answer.strip()] for guard in bank.guards]),
        ]
    return parts + (_log(bank.records) if bank.records else [])
