"""``tpatch classify``: the labels that a classifier gives, with or without patches."""

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Json, ModelName, Quiet, show_rows
from tpatch_jax.display.console import print_json, result_console
from tpatch_jax.errors import TPatchError

if TYPE_CHECKING:
    from tpatch_jax.models.model import Model

__all__ = ["Classify"]

SHOWN = 100
"""So many inputs at most are listed; all are in ``--json``."""


@dataclass(frozen=True)
class Classify:
    """Name the label of each picture or text, and how many are right where the true ones are known."""

    model: ModelName
    inputs: Annotated[
        Positional[tuple[str, ...]], arg(metavar="INPUT", help="pictures, or texts of a text classifier")
    ] = ()
    _: KW_ONLY
    file: Annotated[str | None, arg(metavar="FILE", help="an .npz of pictures, or texts, one a line")] = None
    part: Annotated[str | None, arg(help="of an .npz: stream, val or train; by default the first of these")] = None
    patches: Annotated[str | None, arg(help="patches to attach")] = None
    dtype: Annotated[str | None, arg(help="float32 or bfloat16")] = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Attach the patches, and print each input with its label."""
        from tpatch_jax.cli.generate import load_edited

        if not self.inputs and self.file is None:
            raise TPatchError("there is nothing to classify; give pictures or texts, or a --file of them")
        model = load_edited(self.model, self.patches, None, self.dtype, self.quiet or self.json)
        if not model.config.labels:
            raise TPatchError(f"{self.model!r} is no classifier; ask it with `tpatch generate`")
        names, inputs, wanted = self._read(model)
        said = model.classify(inputs)
        right = None
        if any(label is not None for label in wanted):
            right = sum(label == target for label, target in zip(said, wanted, strict=True)) / len(said)
        lines: list[dict[str, Any]] = [
            {"input": name, "label": label, **({} if target is None else {"true": target})}
            for name, label, target in zip(names, said, wanted, strict=True)
        ]
        if self.json:
            print_json({"answers": lines, **({} if right is None else {"accuracy": right})})
            return
        columns = ["input", "label", *(["true"] if right is not None else [])]
        rows = [[str(line.get(name, "")) for name in columns] for line in lines[:SHOWN]]
        show_rows(f"labels of {self.model}", [columns, *rows])
        if len(lines) > SHOWN:
            result_console().print(f"the first {SHOWN} of {len(lines):,} are shown; all are in --json", markup=False)
        if right is not None:
            result_console().print(f"{right:.4f} of {len(lines):,} are right", markup=False)

    def _read(self, model: "Model") -> tuple[list[str], list[Any], list[str | None]]:
        """What inputs are called, the inputs, and their true labels as far as they are known."""
        from tpatch_jax.images import as_image
        from tpatch_jax.models.inputs import read_inputs
        from tpatch_jax.storage.image_file import PARTS, is_image_file, named_labels, read_image_part

        if self.part not in (None, *PARTS):
            raise TPatchError(f"there is no part {self.part!r}; choose from {', '.join(PARTS)}")
        images = model.config.image is not None
        inputs = [as_image(path, f"input {n}") if images else path for n, path in enumerate(self.inputs)]
        names = list(self.inputs)
        wanted: list[str | None] = [None] * len(self.inputs)
        if self.file is None:
            return names, inputs, wanted
        if not is_image_file(self.file):
            read = read_inputs(self.file)
            return (
                [*names, *(getattr(one, "source", "") or one for one in read)],
                [*inputs, *read],
                [*wanted, *[None] * len(read)],
            )
        parts = (self.part,) if self.part else ("stream", "val", "train")
        part = read_image_part(self.file, parts, labels=False)
        known = named_labels(part.labels, model.config.labels) if part.labels else [None] * len(part.images)
        names += [f"{part.name}-{number}" for number in range(len(part.images))]
        return names, [*inputs, *part.images], [*wanted, *known]
