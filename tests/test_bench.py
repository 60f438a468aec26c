"""The benchmark: what it reports, what it refuses, and the counting underneath; on a tiny model."""

import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from conftest import make_tiny_model, write_tiny_folder

from tpatch_jax.benchmarks import bench as bench_
from tpatch_jax.benchmarks import compiled_plan, gauges, on_device, side_by_side, topology
from tpatch_jax.benchmarks import probe as probe_
from tpatch_jax.benchmarks.bench import FULL, QUICK, Plan
from tpatch_jax.benchmarks.edits_to_time import edits_to_time
from tpatch_jax.benchmarks.gauges import compilations, median_and_spread, seconds_of
from tpatch_jax.benchmarks.plan import Machine, Measured, Network, cost
from tpatch_jax.benchmarks.recompilation import recompilations
from tpatch_jax.benchmarks.topology import Chip, Topology
from tpatch_jax.cli import bench as command
from tpatch_jax.cli import main as cli
from tpatch_jax.editors.tpatcher.settings import PRESETS
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest

PROMOTION = "standard"  # optax takes steps

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = Plan(
    edits={"last": (1, 16)},
    repeats=1,
    compared=2,
    paper_steps=1,
    paper_whole=False,
    neurons=(0, 100),
    tokens=2,
    rounds=2,
    warm=(1, 4),
    new=(3,),
)
PROMISED = {
    "forward_equivalents_per_edit",
    "fit_forward_equivalents_per_edit",
    "peak_memory_ratio",
    "speedup_over_paper_loop",
    "merged_overhead",
    "attached_overhead",
    "recompilations",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, restored) -> Iterator[Path]:
    """A folder with a model; caches go there too."""
    folder = tmp_path_factory.mktemp("bench")
    write_tiny_folder(make_tiny_model(max_position_embeddings=512), folder / "tiny")
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("TPATCH_CACHE", str(folder / "cache"))
        patching.setattr(bench_, "QUICK", TINY)
        # One process has all the compiled programs; that a process of its own does the same is tested below.
        patching.setattr(bench_, "probe", probe_._measure)
        yield folder


def test_one_run_says_all_that_is_promised(place, capsys):
    arguments = ["bench", str(place / "tiny"), "--quick", "-o", str(place / "bench.png"), "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) >= PROMISED
    for name in ("forward_equivalents_per_edit", "fit_forward_equivalents_per_edit", "exact", "peak_memory"):
        assert {site: set(by_count) for site, by_count in found[name].items()} == {"last": {"1", "16"}}
    for site, by_count in found["forward_equivalents_per_edit"].items():
        for count, value in by_count.items():
            assert 0 < found["fit_forward_equivalents_per_edit"][site][count] < value
            spread = found["spread"][site][count]
            assert spread["lower"] <= spread["median"] <= spread["upper"]
    assert set(found["attached_overhead"]) == set(found["merged_overhead"]) == {"0", "100"}
    assert set(found["speedup_over_paper_loop"]) == {"single", "batch"}
    assert found["paper_loop"]["edits"] == 2
    # The same process edits 1 and 16, so the later peak is no lower, but for the patches that are taken off.
    assert 0.9 < found["peak_memory_ratio"] < 2
    assert (place / "bench.png").read_bytes()[:4] == b"\x89PNG"
    command._show(found)
    said = capsys.readouterr().out
    assert "forward equivalents per edit" in said
    assert "programs compiled for new numbers of edits: " in " ".join(said.split())


def test_without_an_accelerator_nothing_is_run_on_one(place, capsys):
    assert cli.main(["bench", str(place / "nowhere"), "--device", "--json"]) == 1
    told = capsys.readouterr()
    result = json.loads(told.out.splitlines()[-1])
    assert (result["accelerator"], result["ran"]) == (None, False)
    assert result["reason"] in told.err
    assert "JAX finds no accelerator here, only cpu" in told.err


def test_an_accelerator_is_measured_beside_its_plan(place, capsys, monkeypatch):
    # A CPU that says it is one; of the plan a few programs.
    here = Topology("pretended", Chip(1e12, 1e11, 2e9, 1e9), tuple(jax.devices()[:1]), 1)
    several = compiled_plan.edit_programs
    few = {"last layer: what is said", "reading: embeddings", "values: what is said unedited"}
    monkeypatch.setattr(on_device, "describe_accelerator", lambda: here)
    monkeypatch.setattr(on_device, "sites_of", lambda config: ("last",))
    monkeypatch.setattr(
        compiled_plan,
        "edit_programs",
        lambda places, count, settings, every: [p for p in several(places, count, settings) if p.name in few],
    )
    arguments = ["bench", str(place / "tiny"), "--device", "--quick", "--edits", "1", "--dtype", "float32"]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ran"]
    assert result["accelerator"]["devices"] == 1
    figures = result["edits"]["last"]["1"]
    assert figures["predicted"]["ms_per_edit"] > 0
    assert figures["ms_per_edit"] > figures["predicted"]["ms_per_edit"]
    assert figures["predicted"]["memory_bytes_per_chip"] > 0
    assert 0 <= figures["exact"] <= 1
    assert figures["peak_memory_bytes"] is None  # a CPU does not say
    command._show_device(result)
    said = " ".join(capsys.readouterr().out.split())
    assert "at least" in said
    assert f"{figures['ms_per_edit']:.1f}" in said
    assert cli.main(["bench", str(place / "tiny"), "--device", "--dtype", "int8"]) == 1
    assert "--device measures float32 and bfloat16" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("kind", "flops"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("NVIDIA H200", 989e12), ("Tesla T4", 65e12), ("Other", math.inf)],
)
def test_devices_are_known_by_their_kind(monkeypatch, kind, flops):
    device = SimpleNamespace(platform="tpu", device_kind=kind, process_index=0, memory_stats=lambda: {"bytes_limit": 7})
    monkeypatch.setattr(topology.jax, "devices", lambda: [device] * 4)
    here = topology.describe_accelerator()
    assert (here.name, here.chip.flops, here.chip.memory) == (kind, flops, 7.0)
    assert (len(here.devices), here.hosts) == (4, 1)


def test_a_new_number_of_edits_compiles_nothing(place):
    model = make_tiny_model(max_position_embeddings=512)
    # Of one length, so that no new one comes with a new number.
    requests = [EditRequest(f"the {a}{b} is in", "q", f"{a}{b}") for a in "abcd" for b in "klmn"]
    # How many a random network wants to fit again differs from number to number, so nothing is fitted again.
    once = dataclasses.replace(PRESETS["default"], attempts=1)
    compiled, growth = recompilations(model, requests, (1, 2, 4, 8, 16), (3, 7, 13), once)
    assert compiled == 0
    assert growth == 0
    # The counter is no decoration: what was never warm is compiled.
    jax.clear_caches()
    assert recompilations(model, requests, (), (1,))[0] > 0


def test_a_probe_measures_in_a_process_of_its_own(place):
    found = probe_.probe(str(place / "tiny"), "last", 1, 1, None, None)
    assert found["peak"] > 2**20
    assert found["compilations"] == 0
    assert 0 <= found["exact"] <= 1
    assert len(found["forward_equivalents"]) == 1


def test_a_probe_that_fails_says_why(place):
    with pytest.raises(TPatchError, match=r"measuring 3 edits at site=last failed: .*nowhere.*; ask for fewer edits"):
        probe_.probe(str(place / "nowhere"), "last", 3, 1, None, None)


def test_the_plans_measure_what_the_figures_need():
    for plan in (FULL, QUICK, TINY):
        assert 16 in plan.edits["last"]
        assert max(plan.new) < max(plan.warm)
        assert not set(plan.new) & set(plan.warm)
    assert {1, 16, 256, 4096} == set(FULL.edits["last"])
    assert {0, 100, 1000, 10_000} == set(FULL.neurons)


def test_a_plan_counts_what_it_says(capsys):
    network, machine = Network("small", 1e6, 10, 2, 100), Machine("two", 2, 1, 1e9, 5e6)
    found = cost(network, machine, 100, Measured(2.0, 8, 1.0, 4.0, 5, 600, 0.5))
    # 100 edits of 2 passes over 8 tokens, and 5 searches of 100 keys among 1,000 rows; two devices at half their speed.
    assert found.seconds == pytest.approx((100 * 2 * 8 * 2e6 + 100 * 5 * 1000 * 20) / 1e9)
    assert (found.weights, found.memory, found.patches, found.disk) == (2e6, 20_000, 4000, 48_000)
    assert found.wider == pytest.approx(100 * 20 / 1e6)
    assert found.fits
    assert not cost(network, machine._replace(memory=2e6), 100).fits
    assert cli.main(["bench", "--plan", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["edits"] for row in told["plan"]} == {10_000, 100_000, 1_000_000}
    assert {row["network"] for row in told["plan"]} == {"7B", "70B"}
    assert cli.main(["bench", "--plan"]) == 0
    assert "on paper" in capsys.readouterr().out


def test_made_up_edits_differ_and_name_their_subject():
    requests = edits_to_time(4096)
    assert len({request.prompt for request in requests}) == 4096
    for request in requests[::97]:
        assert request.subject in request.prompt
        assert request.target
        assert request.locality[0] != request.prompt


def test_edits_from_files(tmp_path):
    flat = [
        {"case_id": n, "prompt": f"{name} speaks", "target_new": "Greek", "subject": name, "locality_prompt": "Up is"}
        for n, name in enumerate(("Ada", "Bo", "Ada"))
    ]
    more = {"ground_truth": "Latin", "locality_ground_truth": "blue"}
    flat = [{**row, **more, "rephrase_prompt": f"{row['subject']} says"} for row in flat]
    (tmp_path / "flat.json").write_text(json.dumps(flat))
    assert [request.subject for request in edits_to_time(2, tmp_path / "flat.json")] == ["Ada", "Bo"]
    (tmp_path / "own.jsonl").write_text('{"prompt": "Bo speaks", "target": "Greek"}\n')
    assert edits_to_time(1, tmp_path / "own.jsonl")[0].target == "Greek"
    with pytest.raises(TPatchError, match=r"flat.json has 2 different prompts, and 3 edits were asked for; ask for"):
        edits_to_time(3, tmp_path / "flat.json")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--output", "nowhere/bench.png"], "the folder of nowhere/bench.png does not exist; make it first"),
        (["--output", "bench.txt"], "bench.txt is of no kind that pictures have; give one of"),
        (["--file", "one.jsonl"], "one.jsonl has 1 different prompts, and 4096 edits were asked for"),
        (["--dtype", "float16"], "dtype 'float16' is not supported"),
        (["--quick", "--file", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_options_are_named(place, capsys, monkeypatch, tmp_path, more, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.jsonl").write_text('{"prompt": "Bo speaks", "target": "Greek"}\n')
    assert cli.main(["bench", str(place / "tiny"), *more]) == 1
    assert words in " ".join(capsys.readouterr().err.split())


def test_an_encoder_is_refused(place, capsys, monkeypatch):
    import dataclasses

    model = make_tiny_model()
    encoder = dataclasses.replace(model, config=dataclasses.replace(model.config, causal=False))
    monkeypatch.setattr(command, "load", lambda *_: encoder)
    assert cli.main(["bench", "bert"]) == 1
    assert "is an encoder; the benchmark needs a decoder" in " ".join(capsys.readouterr().err.split())


def test_a_system_that_does_not_say_how_much_memory_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.spec_from_file_location("gauges_elsewhere", gauges.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(TPatchError, match="the memory of a process is not known on this system"):
        module.peak_bytes()


def test_spread_and_time():
    assert median_and_spread([4.0]) == {"median": 4.0, "lower": 4.0, "upper": 4.0}
    assert median_and_spread([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "lower": 2.0, "upper": 4.0}
    calls = []
    found = seconds_of({"first": lambda: calls.append(1), "second": lambda: calls.append(2)}, 2)
    assert calls == [1, 2, 1, 2, 1, 2]  # warm, then in turn
    assert [len(found[name]) for name in found] == [2, 2]


def test_compilations_are_counted_where_they_happen():
    run = jax.jit(lambda x: x * 5 - 2)
    with compilations() as outer:
        run(jnp.ones(3))
        with compilations() as inner:
            run(jnp.ones(3))
    assert outer[0] >= 1
    assert inner[0] == 0


OTHER_BUILD = """
import dataclasses
from types import SimpleNamespace

@dataclasses.dataclass(frozen=True)
class Settings:
    site: str = "auto"

@dataclasses.dataclass(frozen=True)
class EditRequest:
    prompt: str
    target: str
    subject: str

PRESETS = {"default": Settings()}
load_model = lambda name, dtype=None: name

def edit(model, requests, settings):
    assert settings.site in ("last", "subject") and model == "a model"
    if "fails" in __file__:
        raise ValueError("an older mistake")
    return {}, SimpleNamespace(requests=[SimpleNamespace(held=number == 0) for number, _ in enumerate(requests)])
"""


@pytest.fixture
def build(tmp_path):
    """``build(name)`` is the folder of a build that has only the public names that a comparison uses."""

    def make(name: str) -> Path:
        (tmp_path / name / "tpatch_jax").mkdir(parents=True)
        (tmp_path / name / "tpatch_jax" / "__init__.py").write_text(OTHER_BUILD, "utf-8")
        return tmp_path / name

    return make


def test_another_build_runs_in_a_process_that_imports_it(build):
    calls = [[{"prompt": "a", "target": "b", "subject": "a"}] * 4] * 3
    given = {"model": "a model", "dtype": None, "site": "last", "calls": calls}
    told = side_by_side._run(build("older"), given)
    assert told["package"] == str(build("another").parent / "older" / "tpatch_jax")
    assert told["held"] == [1, 1, 1]
    assert len(told["cpu_seconds"]) == len(told["seconds"]) == 3
    assert told["peak"] > 2**20
    with pytest.raises(TPatchError, match=r"the build in .*fails failed: ValueError: an older mistake; see that it"):
        side_by_side._run(build("fails"), given)


def test_builds_take_turns_on_the_same_edits(place, build, monkeypatch, capsys):
    other, ran = build("older"), []

    def run(folder: Path, given: dict) -> dict:
        ran.append((folder, given["site"], json.dumps(given["calls"])))
        times = [30.0, 4.0, 8.0, 6.0] if folder == other else [20.0, 1.0, 2.0, 3.0]
        of_each = len(given["calls"][0])
        held = [0] + [of_each] * 2 + [0] if folder == other else [of_each] * 4
        return {"device": "a device", "cpu_seconds": times, "held": held, "peak": 2**30 if folder == other else None}

    monkeypatch.setattr(side_by_side, "_run", run)
    monkeypatch.setattr(side_by_side, "FULL", side_by_side.Rounds({"last": (1, 2), "subject": (1,)}, 2, 1, 3))
    arguments = ["bench", "a model", "--against", str(other)]
    assert cli.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["device"] == "a device"
    assert told["edits"]["last"]["2"]["cpu_seconds_per_edit"] == {"this": 1.0, "other": 3.0, "ratio": 1 / 3}
    assert told["edits"]["subject"]["1"]["first_cpu_seconds"] == {"this": 20.0, "other": 30.0, "ratio": 2 / 3}
    assert told["edits"]["last"]["1"]["held"]["other"] == pytest.approx(2 / 3)
    assert told["edits"]["last"]["1"]["peak_memory"] == {"this": 0, "other": 2**30, "ratio": 0.0}
    here = Path(side_by_side.tpatch_jax.__path__[0]).parent
    assert [folder for folder, _, _ in ran] == 3 * [here, other] + 3 * [other, here]
    assert len({calls for _, site, calls in ran if site == "subject"}) == 1
    calls = json.loads(ran[2][2])
    assert [len(call) for call in calls] == [2] * 4
    assert len({request["prompt"] for call in calls for request in call}) == 8
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "last, 2 in a call" in said
    assert "0.333" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--against", "nowhere"], "nowhere holds no package tpatch_jax; give the folder of a checkout"),
        (["--against", ".", "--plan"], "--against goes without --plan"),
        (["--against", ".", "--output", "bench.png"], "--against goes without --output"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(monkeypatch, tmp_path, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *more]) == 1
    assert words in " ".join(capsys.readouterr().err.split())
