"""``tpatch transcribe``: what is said in recordings, with or without patches."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Json, ModelName, Quiet
from tpatch_jax.display.console import print_json, result_console
from tpatch_jax.errors import TPatchError

__all__ = ["Transcribe"]


@dataclass(frozen=True)
class Transcribe:
    """Write down what is said in recordings, each at most as long as the model reads at once, 30 s."""

    model: ModelName
    audio: Annotated[Positional[tuple[str, ...]], arg(metavar="AUDIO", help="WAV or FLAC files")] = ()
    _: KW_ONLY
    patches: Annotated[str | None, arg(help="patches to attach")] = None
    dtype: Annotated[str | None, arg(help="float32 or bfloat16")] = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Attach the patches, and print the transcript of each recording."""
        from tpatch_jax.audio import as_audio
        from tpatch_jax.cli.generate import load_edited

        if not self.audio:
            raise TPatchError("there is nothing to transcribe; give WAV or FLAC files")
        # Before the model, which takes longer.
        prompts = [as_audio(path, f"recording {number}") for number, path in enumerate(self.audio)]
        model = load_edited(self.model, self.patches, None, self.dtype, self.quiet or self.json)
        texts = model.transcribe(prompts)
        lines: list[dict[str, Any]] = [
            {
                "audio": path,
                "seconds": round(prompt.seconds, 2),
                "text": text,
                **({"note": prompt.note} if prompt.note else {}),
            }
            for path, prompt, text in zip(self.audio, prompts, texts, strict=True)
        ]
        if self.json:
            print_json({"transcripts": lines})
            return
        for line in lines:
            name = f"{line['audio']}: " * (len(lines) > 1)
            result_console().print(f"{name}{line['text']}", markup=False, soft_wrap=True)
            if "note" in line:
                result_console().print(f"  ({line['note']})", markup=False, soft_wrap=True)
