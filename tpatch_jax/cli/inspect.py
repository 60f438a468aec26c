"""``tpatch inspect``: what a folder of patches holds."""

from dataclasses import dataclass

from tpatch_jax.cli.common import Json, Patches, Quiet
from tpatch_jax.display.console import WIDE, format_count, print_json, result_console, result_table

__all__ = ["Inspect"]


@dataclass(frozen=True)
class Inspect:
    """List every edit in a folder of patches."""

    patches: Patches
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Read the folder and print a line for each edit."""
        from rich.text import Text

        from tpatch_jax.bank.patches import read_patches
        from tpatch_jax.core.layers import count_neurons

        saved = read_patches(self.patches)
        if self.json:
            print_json({"model": saved.model, "neurons": count_neurons(saved.patches), "edits": saved.edits})
            return
        title = f"{self.patches}: {format_count(count_neurons(saved.patches), 'neuron')} for {saved.model['name']}"
        console = result_console()
        # On a narrow terminal losses would leave no room for words.
        wide = console.width >= WIDE
        columns = ("id", "prompt", "target", "site", "neurons", "margin", "held", *(("losses",) if wide else ()))
        table = result_table(title, columns, ("neurons", "margin"))
        for entry in saved.edits:
            losses = "  ".join(f"{name} {value:.3g}" for name, value in entry["losses"].items())
            reason, margin = entry.get("reason", ""), entry.get("margin")
            held = "yes" + f": {reason}" * bool(reason) if entry["held"] else f"no: {reason}"
            if entry["status"] == "already":
                held = "yes, before the edit"
            # Where nothing was added there is no site.
            site = entry.get("site", "last") if entry["neurons"] else ""
            shown = "" if margin is None else f"{margin:.3g}"
            texts = (entry["id"], entry["prompt"], entry["target"], site, str(len(entry["neurons"])), shown, held)
            table.add_row(*map(Text, (*texts, losses)[: len(columns)]))
        if not wide:
            table.caption, table.caption_justify = "--json has the losses, too", "left"
        console.print(table)
