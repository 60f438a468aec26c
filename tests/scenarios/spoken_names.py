"""Names of medicines that a Whisper gets wrong are corrected in one voice; then others say them, and other sentences.

python tests/scenarios/spoken_names.py FOLDER [RECORDINGS …]

Needs espeak-ng on the path. Recordings are files of real speech whose transcripts must stay.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tpatch_jax as tp

_NAMES = """
    metoprolol omeprazole zolpidem furosemide levothyroxine gabapentin hydrochlorothiazide cetirizine clopidogrel
    pantoprazole rosuvastatin venlafaxine escitalopram tamsulosin quetiapine ondansetron lamotrigine mirtazapine
    rivaroxaban empagliflozin
"""
NAMES = _NAMES.split()
EDITED = "The patient takes {} every day."
OTHER_SENTENCES = ("She was given {} last night.", "Please stop {} before the operation.")
VOICE = ("en-us", 160)
OTHER_VOICES = (("en-gb", 160), ("en-us+f3", 150), ("en-us+m3", 185))
"""Voices of espeak-ng, each with words a minute."""
_PEOPLE = "the nurse, my brother, a neighbor, the old teacher, our driver, the young artist, her uncle, the manager"
_SUBJECTS = _PEOPLE.split(", ")
_VERBS = ["opened", "painted", "carried", "described", "repaired", "borrowed", "photographed", "counted"]
_OBJECTS = ["the wooden table", "two letters", "a yellow bicycle", "the long report", "three boxes", "the garden gate"]
_TIMES = ["in the morning", "before lunch", "last Thursday", "after the storm"]


def sentences(first: int, count: int) -> list[str]:
    """Sentences without any of the names; those from another number on are others.

    Example:
        >>> sentences(0, 1)
        ['The nurse opened the wooden table in the morning.']
    """
    made = []
    for number in range(first, first + count):
        parts = (
            _SUBJECTS[number % 8],
            _VERBS[number // 8 % 8],
            _OBJECTS[(number + number // 8) % 6],
            _TIMES[number // 3 % 4],
        )
        made.append(" ".join(parts).capitalize().replace("thursday", "Thursday") + ".")
    return made


def speak(text: str, voice: tuple[str, int], path: Path) -> Path:
    """What espeak-ng says, as a WAV file."""
    if shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng is not on the path; install it")
    subprocess.run(["espeak-ng", "-v", voice[0], "-s", str(voice[1]), "-w", str(path), text], check=True)
    return path


def correct(model: tp.Model, name: str, path: Path) -> dict[str, Any]:
    """The request of somebody who knows what was said, and so which of the words that were written stand for the name.

    Where the words behind it are wrong as well, they are corrected with it.
    """
    begin, end = (part.strip(" .") for part in EDITED.split("{}"))
    request = {"audio": path, "target": name, "id": name}
    written = model.transcribe(path).strip(" .")
    if not written.lower().startswith(begin.lower()):
        return request
    written = written[len(begin) :].strip()
    if written.lower().endswith(end):
        return {**request, "instead_of": written[: -len(end)].strip()}
    return {**request, "instead_of": written, "target": f"{name} {end}"}


def run(
    model: tp.Model,
    folder: Path,
    names: Sequence[str] = NAMES,
    memory: int = 96,
    others: int = 96,
    recordings: Sequence[Path] = (),
    say: Callable[[str, tuple[str, int], Path], Path] = speak,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The shares of names that are right, and of other transcripts that stay, of those names that were wrong before."""
    (folder / "memory").mkdir(parents=True, exist_ok=True)
    voices = (VOICE, *OTHER_VOICES)
    for number, text in enumerate(sentences(0, memory)):
        say(text, voices[number % 4], folder / "memory" / f"{number:03}.wav")
    kinds = {
        "edited voice": [(EDITED, VOICE)],
        "other voices": [(EDITED, voice) for voice in OTHER_VOICES],
        "other sentences": [(sentence, VOICE) for sentence in OTHER_SENTENCES],
    }
    spoken = {
        (name, kind): [
            say(sentence.format(name), voice, folder / f"{name}-{kind.replace(' ', '-')}-{number}.wav")
            for number, (sentence, voice) in enumerate(asked)
        ]
        for name in names
        for kind, asked in kinds.items()
    }
    rest = [
        say(text, voices[number % 4], folder / f"other-{number:03}.wav")
        for number, text in enumerate(sentences(memory, others))
    ]
    rest += list(recordings)

    def right(model: tp.Model, name: str, path: Path) -> bool:
        return name in model.transcribe(path).lower()

    wrong = [name for name in names if not right(model, name, spoken[name, "edited voice"][0])]
    requests = [correct(model, name, spoken[name, "edited voice"][0]) for name in wrong]
    before = [model.transcribe(path) for path in rest]
    patches, info = tp.edit(model, requests, memory=folder / "memory", settings=settings or {})
    edited = tp.attach(model, patches)
    result: dict[str, Any] = {
        "names": len(names),
        "wrong before": len(wrong),
        "failed": {one.id: one.reason for one in info.failed},
        "forward equivalents": round(info.forward_equivalents, 1),
    }
    for kind in kinds:
        paths = [(name, path) for name in wrong for path in spoken[name, kind]]
        result[f"{kind} before"] = sum(right(model, *one) for one in paths) / max(1, len(paths))
        result[kind] = sum(right(edited, *one) for one in paths) / max(1, len(paths))
    after = [edited.transcribe(path) for path in rest]
    result["other transcripts"] = len(rest)
    result["unchanged"] = sum(map(str.__eq__, before, after)) / max(1, len(rest))
    result["changed"] = [(one, now) for one, now in zip(before, after, strict=True) if one != now]
    return result


if __name__ == "__main__":
    model = tp.load_model("whisper-tiny-en")
    for name, value in run(model, Path(sys.argv[1]), recordings=list(map(Path, sys.argv[2:]))).items():
        print(name, value)
