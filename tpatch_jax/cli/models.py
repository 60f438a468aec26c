"""``tpatch models``: which models there are."""

from dataclasses import dataclass

from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.display.console import print_json, result_console, result_table

__all__ = ["Models"]


@dataclass(frozen=True)
class Models:
    """Say what MODEL may be, and how each is obtained."""

    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Print models by name, and families with what is promised of each."""
        from tpatch_jax.models.checkpoints.sources import NAMED_MODELS
        from tpatch_jax.models.families.promises import PROMISES, promised
        from tpatch_jax.models.families.registry import FAMILIES

        families = [
            {"name": family.name, "model_types": list(family.model_types), **promised(family)} for family in FAMILIES
        ]
        named = [
            {
                "name": entry.name,
                "family": entry.family,
                "parameters": entry.parameters,
                "license": entry.license,
                "description": entry.description,
                "obtained": f"from the wheel {entry.package} {entry.version}, on first use",
            }
            for entry in NAMED_MODELS
        ]
        if self.json:
            tests = {promise.name: promise.test for promise in PROMISES}
            print_json({"families": families, "models": named, "tests": tests})
            return
        console = result_console()
        table = result_table("models by name", ("name", "family", "parameters", "license", "how it is obtained"))
        for entry in named:
            row = [entry["name"], entry["family"], f"{entry['parameters']:,}", entry["license"], entry["obtained"]]
            table.add_row(*row)
        console.print(table)
        # What is promised of all alike would leave no room for names on a narrow terminal.
        alike = ", ".join(f"{promise.name} {promise.claim}" for promise in PROMISES if promise.claim)
        differing = [promise.name for promise in PROMISES if not promise.claim]
        columns = ("family", "model_type in config.json", *differing)
        table = result_table("families: any folder or hub id with safetensors", columns)
        table.caption, table.caption_justify = (
            f"all of them: {alike}; each is a test, which --json names. Exports of Llamas in all but name need "
            "attention without windows and rotation of whole heads, else they are approximate",
            "left",
        )
        for family in families:
            row = [family["name"], ", ".join(family["model_types"]), *(family[name] for name in differing)]
            table.add_row(*row)
        console.print(table)
