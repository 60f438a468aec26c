"""``tpatch inspect``: what a folder of patches holds."""

from dataclasses import dataclass

from tpatch_jax.cli.common import Json, Patches, Quiet
from tpatch_jax.display.console import format_count, print_json, result_console, result_table

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
        table = result_table(title, ("id", "prompt", "target", "neurons", "held", "losses"))
        for entry in saved.edits:
            losses = "  ".join(f"{name} {value:.3g}" for name, value in entry["losses"].items())
            held = "yes" if entry["held"] else f"no: {entry.get('reason', '')}"
            if entry["status"] == "already":
                held = "yes, before the edit"
            texts = (entry["id"], entry["prompt"], entry["target"], str(len(entry["neurons"])), held, losses)
            table.add_row(*map(Text, texts))
        result_console().print(table)
