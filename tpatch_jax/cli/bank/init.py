"""``tpatch bank init``: an empty bank."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from tpatch_jax.cli.bank.common import BankFolder, show_lines
from tpatch_jax.cli.common import Config, Dtype, Json, MemoryText, Preset, Quiet, Set, load, preset_of
from tpatch_jax.display.console import print_json

__all__ = ["Init"]


@dataclass(frozen=True)
class Init:
    """Make an empty bank for a model; all its edits are fitted with the settings given here."""

    bank: BankFolder
    _: KW_ONLY
    model: Annotated[str, arg(help="a name from `tpatch models`, a folder, or a hub id")]
    preset: Preset = None
    config: Config = None
    changes: Set = ()
    memory: MemoryText = None
    dtype: Dtype = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Check the settings, load the model, and make the folder."""
        from rich.markup import escape

        from tpatch_jax.bank.creating import create_bank
        from tpatch_jax.editors.tpatcher.settings import PRESETS
        from tpatch_jax.storage.files import check_vacant
        from tpatch_jax.storage.settings import change, combine, split_changes

        check_vacant(Path(self.bank))
        preset, values = preset_of(self.preset, self.config)
        values = combine(values, split_changes(self.changes))
        change(PRESETS[preset], values)
        model = load(self.model, self.dtype, self.quiet or self.json)
        bank = create_bank(self.bank, model, preset=preset, settings=values, memory=self.memory)
        if self.json:
            print_json({"bank": self.bank, "model": bank.manifest["model"]})
        else:
            show_lines([f"{escape(self.bank)}: an empty bank for {escape(bank.manifest['model']['name'])}"])
