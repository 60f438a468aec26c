"""``tpatch models``: which models there are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.display.console import print_json, result_console, result_table
from tpatch_jax.errors import TPatchError

__all__ = ["Models"]


@dataclass(frozen=True)
class Models:
    """Say what MODEL may be, and how each is obtained; or what a folder is, before any weight is read."""

    check: Annotated[
        str | None,
        arg(metavar="FOLDER", help="say what a checkpoint is, what is read of it, and what is refused and why"),
    ] = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Print models by name, and families with what is promised of each; or what one folder holds."""
        if self.check is not None:
            self._check(Path(self.check).expanduser())
            return
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

    def _check(self, folder: Path) -> None:
        from tpatch_jax.models.checkpoints.check import check_folder

        result = check_folder(folder)
        problems = result["problems"]
        if self.json:
            print_json({**result, "readable": not problems})
        else:
            self._show(result)
        if problems:
            raise TPatchError(f"{folder} cannot be read: {problems[0]}")

    def _show(self, result: dict[str, Any]) -> None:
        table = result_table(f"{result['folder']}", ("what", "as it stands there"))
        rows = {"model_type": result["model_type"], "read as": result["family"], "kind": result["architecture"]}
        if result["text_of"]:
            rows["part"] = f"the text part of a {result['text_of']}; what reads images or speech is left out"
        rows |= {name: entry for name, entry in (result["sizes"] or {}).items() if entry != []}
        rows["export for stock transformers"] = result["export"]
        if weights := result["weights"]:
            rows |= {name: weights[name] for name in ("files", "tensors", "parameters")}
            rows["types"] = ", ".join(f"{kind} ({count})" for kind, count in weights["types"].items())
            names = weights["left_out"]
            more = f" and {len(names) - 8} more, which --json names" if len(names) > 8 else ""
            rows["left out"] = ", ".join(names[:8]) + more or "nothing"
        elif not result["problems"]:
            rows["weights"] = "none there; the settings can be read"
        for name, entry in rows.items():
            shown = "unknown" if entry is None else f"{entry:,}" if type(entry) is int else str(entry)
            table.add_row(name.replace("_", " "), shown)
        for problem in result["problems"]:
            table.add_row("refused", problem)
        result_console().print(table)
