"""What the tests share: strict dtype promotion, a quick hypothesis profile, and a tiny Llama with its tokenizer."""

import dataclasses
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from jax.experimental.compilation_cache import compilation_cache as programs
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tpatch_jax.editors.rome import memit, rome
from tpatch_jax.evaluation import pictures
from tpatch_jax.models import generation, rows
from tpatch_jax.models.families.registry import configure, family_of
from tpatch_jax.models.image_reader import image_reader
from tpatch_jax.models.model import Model, save_model
from tpatch_jax.models.shapes import parameter_shapes
from tpatch_jax.storage.cache import cache_folder

# Workers share the cores: with a pool of threads in each torch is many times slower, most threads waiting for a core.
# XLA's pool has as many threads as `NPROC` says, where it says anything; with one a run takes a seventh less.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NPROC", "1")

QUICK_COMPILER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"""The tests compile thousands of small programs and run each a few times. XLA's older emitters compile them in two
thirds of the time, and a program that is not cut into parts for several threads in three quarters of that."""

if "XLA_FLAGS" not in os.environ:
    # XLA ends a process that names a flag it does not know, so a process of its own tries; workers inherit the answer.
    trial = {**os.environ, "XLA_FLAGS": QUICK_COMPILER, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax.numpy; jax.numpy.zeros(2)"]
    known = subprocess.run(command, env=trial, capture_output=True, check=False).returncode == 0
    os.environ["XLA_FLAGS"] = QUICK_COMPILER if known else ""

# Processes that tests start compile as the tests do: see `quick_compilation`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

hypothesis_settings.register_profile("ci", deadline=None, derandomize=True, max_examples=20, database=None)
hypothesis_settings.load_profile("ci")

END = "<|endoftext|>"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run the real model come first: a worker that began one of them last would keep all others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("real_model")}
    items.sort(key=lambda item: item.path not in slow)


PROGRAMS = "COMPILED_PROGRAMS"
"""The variable that tells the workers of a run in which folder they keep compiled programs."""


def pytest_configure(config: pytest.Config) -> None:
    """One folder for all workers of a run: what one of them has compiled, the other one reads."""
    if not hasattr(config, "workerinput"):
        os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="compiled-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """The folder goes with the run."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(PROGRAMS), ignore_errors=True)


def keep_programs(folder: Path | None) -> None:
    """Read and write compiled programs there, from now on."""
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # By default the name of the folder is part of what a program is asked for by, and commands in tests have others.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    programs.reset_cache()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache() -> Iterator[Path]:
    """A program is compiled once, by either worker; what a run compiled goes with it.

    A program that is read is the one that was compiled, bit for bit; it is asked for by what it computes, JAX's version
    and the compiler's flags. JAX does not write a program in one piece, so that another process may read half of it: a
    checksum tells, and the program is compiled (the warning of it is passed over, in ``pyproject.toml``).
    """
    # A program's operations need not say from which of pytest's many calls they come.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    folder = Path(os.environ[PROGRAMS])
    keep_programs(folder)
    yield folder
    keep_programs(None)


MANY_MAPPINGS = 16_000
"""Linux lets a process map 65,530 pieces of memory, of which a compiled program takes several."""


@pytest.fixture(scope="session", autouse=True)
def rare_collections() -> Iterator[None]:
    """Looking for cycles among all that was imported, again and again, took a tenth of the time of small networks."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def plain_pictures() -> Iterator[None]:
    """Reports are drawn without working out who needs how much room, half the time of a picture; one test does it."""
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(pictures, "LAYOUT", None)
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_programs() -> Iterator[None]:
    """Let go of compiled programs before there are too many: a process can map only so many before the compiler fails.

    Until then a module uses what those before it traced and compiled.
    """
    yield
    mappings = Path("/proc/self/maps")
    if not mappings.exists() or mappings.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def restored(compilation_cache: Path) -> Iterator[None]:
    """Commands keep compiled programs in a folder; that must not outlive the tests of a module."""
    yield
    keep_programs(compilation_cache)


@pytest.fixture(scope="module")
def programs_compiled_anew(restored: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """For modules about compilation itself: they read no program that an earlier run compiled."""
    keep_programs(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module", autouse=True)
def promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Strict dtype promotion; a module says ``PROMOTION = "standard"`` where optax, which needs it, takes steps."""
    with jax.numpy_dtype_promotion(getattr(request.module, "PROMOTION", "strict")):
        yield


@pytest.fixture(scope="module", autouse=True)
def matmul_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """The precision that an editor and the commands set, so that what a test runs before and after has their programs.

    On a CPU it changes no result, but a program asked for in another precision is traced, lowered and compiled again. A
    module that asks whether it is set says ``PRECISION = None``, JAX's own default.
    """
    with jax.default_matmul_precision(getattr(request.module, "PRECISION", "highest")):
        yield


def bits(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    """All there is to know about the arrays of a tree, for comparisons bit for bit."""
    return [(str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def same(left: Any, right: Any) -> bool:
    """Whether two trees have the same structure and the same bits."""
    return jax.tree.structure(left) == jax.tree.structure(right) and bits(left) == bits(right)


def relative(left: Any, right: Any) -> float:
    """``‖left − right‖ / ‖right‖`` in float64."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    return float(np.linalg.norm(left - right) / max(np.linalg.norm(right), 1e-30))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a few merges."""
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n")]
    words = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE({word: number for number, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def make_tiny_model(seed: int = 0, defaults: Mapping[str, Any] = LLAMA, **changes: Any) -> Model:
    """A random Llama of three layers and width 16; ``changes`` go into its ``config.json``."""
    settings = {**defaults, **changes}
    config, rng = configure(settings), np.random.default_rng(seed)
    if family_of(settings).own_head:
        config = dataclasses.replace(config, tied=settings["tie_word_embeddings"])

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        around = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        # Of experts' kernels there are many; beside experts stand no neurons.
        inputs = max(1, leaf.shape[max(0, leaf.ndim - 2)])
        spread = 0.1 if around else 1.0 if "embed" in jax.tree_util.keystr(path) else inputs**-0.5
        return jax.device_put((around + spread * rng.normal(size=leaf.shape)).astype(np.float32))

    params = jax.tree_util.tree_map_with_path(draw, parameter_shapes(config))
    tokenizer = tiny_tokenizer() if config.image is None else image_reader(config, settings)
    return Model(config, params, tokenizer, "tiny", None, settings)


@pytest.fixture(scope="session")
def tiny_model() -> Model:
    return make_tiny_model()


def write_tiny_folder(model: Model, folder: Path) -> Path:
    """The model as a Hugging Face style folder, tokenizer included."""
    save_model(model, folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_folder(tiny_model: Model) -> Callable[[Path], Path]:
    """``tiny_folder(tmp_path)`` writes `tiny_model` below it; ``load_model`` reads what it returns."""
    return lambda path: write_tiny_folder(tiny_model, path / "tiny")


def is_optimised(node: pytest.Module | pytest.Item, module: ModuleType) -> bool:
    """Real models take longer to run than to compile, unless a module says ``OPTIMISED = False``: it runs few steps."""
    return node.get_closest_marker("real_model") is not None and getattr(module, "OPTIMISED", True)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nearly all the time of small networks is compilation, so they do without most optimisations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not is_optimised(request.node, request.module))
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def optimised_real_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """The programs of a real model are optimised in the modules of small networks as well."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before and not is_optimised(request.node, request.module))
    yield
    jax.config.update("jax_disable_most_optimizations", before)


MODELS = cache_folder()
"""Where models are kept outside the tests."""


@pytest.fixture(scope="session")
def cache_with_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for the tests that has the same models as the user's: another one would fetch and convert them again."""
    folder = tmp_path_factory.mktemp("tpatch")
    # Models are put in place by a rename, for which both folders have to be of one disk.
    for name in ("models", "tmp"):
        (MODELS / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(MODELS / name, target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def few(cache_with_models: Path) -> Iterator[None]:
    """Few contexts for values at subjects, so that little is compiled, and a cache for the tests."""
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("TPATCH_CACHE", str(cache_with_models))
        patching.setattr(rome, "CONTEXTS", ((2, 2),))
        patching.setattr(memit, "CONTEXTS", ((4, 2),))
        yield


@pytest.fixture(scope="module")
def few_lengths() -> Iterator[None]:
    """Rows and caches of 32 or 64 tokens: each length is compiled, and a small network runs a longer one in no time.

    For modules that ask what comes out, which padding does not change; others ask about lengths.
    """
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(rows, "STEP", 32)
        patching.setattr(generation, "LEAST", 32)
        yield


@pytest.fixture(scope="session")
def letters(tmp_path_factory) -> Path:
    """A text for memories, one token a letter, so that all rows are of one length and few shapes are compiled."""
    path = tmp_path_factory.mktemp("letters") / "letters.txt"
    chosen = np.random.default_rng(3).choice(list("abcdfgjklmopqrsuvwxyz0123456789"), 8 * 64)
    path.write_text("".join(chosen), "utf-8")
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """Inputs for the memory of classifiers and encoder-decoders, one a line, all of one length."""
    path = tmp_path_factory.mktemp("inputs") / "inputs.txt"
    rng = np.random.default_rng(4)
    path.write_text("\n".join(" ".join(rng.choice(list("abcdfgjklmopqrsuvwxyz"), 6)) for _ in range(40)), "utf-8")
    return path
