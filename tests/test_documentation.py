"""What README and guides show works: python blocks run, command lines parse; the site builds with every public name."""

import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_models import PLAIN
from conftest import make_tiny_model, write_tiny_folder
from flax import nnx
from gguf import GGMLQuantizationType
from test_gguf_export import write_llama
from tiny_families import tiny_model as family_model
from tiny_families import tiny_sound, write_recordings, write_sound

import tpatch_jax as tp
from tpatch_jax.cli import main as cli
from tpatch_jax.editors import model_memory
from tpatch_jax.evaluation import runner
from tpatch_jax.models import memory_text

PROMOTION = "standard"  # optax takes steps
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENGLISH = (
    "The theory in the inn: winter thins the herd, and the hen then hides. Numbers 1 to 9, and then some more. " * 3
)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(page.name, text) for page in PAGES for text in BLOCK.findall(page.read_text("utf-8"))]

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.py"))


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.fc1, self.fc2 = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.gelu(self.fc1(x)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.mlp = Mlp(rngs)

    def __call__(self, x):
        return x + self.mlp(x)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(60, 16, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(4)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x)


class LinenMlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(self.hidden)(x))
        return nn.Dense(16)(x)


class LinenBlock(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        return x + LinenMlp(self.hidden, name="mlp")(x)


class LinenNetwork(nn.Module):
    hidden: int = 32

    @nn.compact
    def __call__(self, tokens, deterministic: bool = False):
        embed = nn.Embed(60, 16)
        x = embed(tokens)
        for number in range(4):
            x = LinenBlock(self.hidden, name=f"block_{number}")(x)
        return embed.attend(x)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    labels = {"id2label": {"0": "SUPPORTS", "1": "REFUTES"}, "label2id": {"SUPPORTS": 0, "REFUTES": 1}}
    model = make_tiny_model(max_position_embeddings=128)
    model.tokenizer.chat_template = PLAIN
    folder = write_tiny_folder(model, tmp_path_factory.mktemp("tiny") / "model")
    seen = {"id2label": {"0": "normal", "1": "pneumonia"}, "label2id": {"normal": 0, "pneumonia": 1}}
    named = {"models/fever": family_model("bert", **labels), "models/xray": family_model("vit", **seen)}
    named["whisper-tiny-en"] = family_model("whisper")
    return {"smollm2-135m": tp.load_model(folder), **named}


@pytest.fixture
def given():
    """What the blocks on foreign networks take for granted: the reader's own network."""
    tokens = jnp.arange(16).reshape(2, 8)
    module = LinenNetwork()
    rows = np.random.default_rng(0).integers(0, 60, (8, 16)).tolist()
    return {
        "model": Network(nnx.Rngs(0)),
        "tokens": tokens,
        "module": module,
        "params": module.init(jax.random.key(0), tokens)["params"],
        "rows_of_token_ids": rows,
    }


def stand_in(models, folder, monkeypatch, site="last"):
    """Tiny models in place of real ones, a folder and a cache of their own; edits at the site that compiles fast."""
    load = tp.load_model
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TPATCH_CACHE", str(folder / "cache"))
    monkeypatch.setattr(tp, "load_model", lambda name, mesh=None: models[name] if name in models else load(name))
    monkeypatch.setattr(memory_text, "TEXTS", 16)
    monkeypatch.setattr(model_memory, "SPANS", 8)
    # What a random model samples is everything at once, and no patch can stay silent on that.
    (folder / "english.txt").write_text(ENGLISH, "utf-8")
    for module, name in ((tp, "edit"), (tp, "create_bank"), (runner, "evaluate")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), memory=folder / "english.txt"))
    monkeypatch.setattr(tp, "edit", functools.partial(tp.edit, settings=replace(tp.PRESETS["default"], site=site)))


# What tunix 0.1.7 writes flax 0.12.8 and jax 0.10.2 no longer want.
@pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:jax.interpreters.pxla.thread_resources:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning")
@pytest.mark.parametrize(("page", "text"), BLOCKS, ids=[f"{page}-{n}" for n, (page, _) in enumerate(BLOCKS)])
def test_python_blocks_run(page, text, models, given, inputs, tmp_path, monkeypatch, few_lengths):
    bonsai = [f"bonsai.models.{name}.modeling" for name in ("qwen3", "vit", "whisper")]
    for package in ("tunix.models.qwen3.model", *bonsai):
        if f"from {package.rpartition('.')[0]} import" in text:
            pytest.importorskip(package, reason=f"{package} is only needed to run its own examples")
    # Once with subjects, where the library is introduced.
    stand_in(models, tmp_path, monkeypatch, "auto" if (page, text) == BLOCKS[0] else "last")
    (tmp_path / "claims.txt").write_bytes(inputs.read_bytes())
    if "whisper" in text:
        write_sound(write_recordings(tmp_path / "recordings").parent / "call.wav", tiny_sound(1))
    exec(compile(text, f"{page}: a python block", "exec"), dict(given))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run_in_a_reduced_form(name, models, tmp_path, monkeypatch, few_lengths):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="the extra 'report' is not installed")
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    monkeypatch.setenv("TPATCH_QUICK", "1")
    stand_in(models, tmp_path, monkeypatch)
    text = (ROOT / "notebooks" / f"{name}.py").read_text("utf-8")
    if "gguf" in name:
        write_llama(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf", GGMLQuantizationType.Q4_1)
    exec(compile(text, name, "exec"), {"__name__": name})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_say_what_their_text_says(name):
    jupytext = pytest.importorskip("jupytext", reason="the extra 'notebooks' is not installed")
    path = ROOT / "notebooks" / f"{name}.ipynb"
    text, notebook = jupytext.read(path.with_suffix(".py")), jupytext.read(path)
    assert [cell.source for cell in text.cells] == [cell.source for cell in notebook.cells]
    outputs = [output.output_type for cell in notebook.cells for output in cell.get("outputs", ())]
    assert outputs
    assert "error" not in outputs
    assert path.stat().st_size < 300_000


def command_lines():
    """Every ``tpatch …`` in the shell blocks of the pages, with the page that it is on."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
        lines = [line[4:] for line in text.replace("\\\n", " ").splitlines() if line.startswith("    ")]
        for line in lines:
            for part in re.split(r";|&&", re.sub(r"\s#.*", "", line)):
                if part.split()[:1] == ["tpatch"]:
                    yield page.name, part.strip()


def spelt(line):
    """The arguments of the command lines that one line of a synopsis stands for.

    ``[…]`` is there, of ``a|b`` each command but only the first value is, ``N`` is a number, ``…`` is nothing more.
    """
    words = shlex.split(re.sub(r"(?<=\w)…", "", re.sub(r"[\[\]]", "", line)))[1:]
    first = 1 if words[0] == "bank" else 0
    for command in words[first].split("|"):
        rest = ["1" if word == "N" else word.split("|")[0] for word in words[first + 1 :]]
        # A synopsis of several commands does not say what each takes.
        yield [*words[:first], command, *(["--help"] if "|" in words[first] else rest)]


@pytest.fixture(scope="module")
def parsed():
    """Runs the real parser on arguments, with commands that do nothing."""
    with pytest.MonkeyPatch.context() as patching:
        for command in (*cli.COMMANDS.values(), *cli.BANK_COMMANDS.values()):
            patching.setattr(command, "run", lambda self: None)

        def run(arguments):
            try:
                return cli.main(arguments)
            except SystemExit as ended:
                return ended.code

        yield run


LINES = sorted({(page, line) for page, line in command_lines()})


def test_there_are_command_lines_on_the_pages():
    assert len(LINES) > 40
    assert {page for page, _ in LINES} >= {"README.md", "index.md", "bank.md"}


@pytest.mark.parametrize(("page", "line"), LINES)
def test_command_lines_parse(page, line, parsed, capsys):
    for arguments in spelt(line):
        assert not parsed(arguments), capsys.readouterr()


def test_a_command_line_that_cannot_be_is_found(parsed, capsys):
    assert parsed(["edit", "smollm2-135m", "-o", "out", "--subjekt", "France"])
    assert "subjekt" in capsys.readouterr().err


def test_the_site_builds_and_lacks_no_public_name(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(site)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    spec = importlib.util.spec_from_file_location("documentation_hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert {"tpatch_jax.edit", "tpatch_jax.core.patch.sharpen"} <= set(hooks.public_names())
    hooks.on_post_build({"site_dir": str(site)})
    monkeypatch.setattr(hooks, "public_names", lambda: ["tpatch_jax.edit", "tpatch_jax.nowhere"])
    with pytest.raises(hooks.PluginError, match=r"lacks tpatch_jax\.nowhere;"):
        hooks.on_post_build({"site_dir": str(site)})
