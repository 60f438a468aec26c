"""What an edit runs, for TPUs: every program lowers; with libtpu it is compiled, and its costs are read."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, write_tiny_folder
from jax.sharding import NamedSharding, PartitionSpec
from tiny_families import tiny_settings

from tpatch_jax.benchmarks import compiled_plan, topology
from tpatch_jax.benchmarks import programs as programs_module
from tpatch_jax.benchmarks.compiled_plan import compile_programs, roofline, split_weights
from tpatch_jax.benchmarks.network_shapes import SHAPES, network_shape
from tpatch_jax.benchmarks.other_programs import other_programs
from tpatch_jax.benchmarks.program_costs import ProgramCosts, program_costs
from tpatch_jax.benchmarks.programs import Places, Program, Workload, edit_programs
from tpatch_jax.benchmarks.topology import CHIPS, Chip, Topology, compile_lowered, create_mesh, describe_topology
from tpatch_jax.cli import main as cli
from tpatch_jax.core.positive import cholesky, cholesky_in_blocks, solve_lower_in_blocks, solve_positive
from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.families.registry import configure
from tpatch_jax.storage.settings import change

PROMOTION = "standard"  # optax takes steps
PRECISION = None  # what lowers for a TPU has the precision that the library itself sets
pytestmark = pytest.mark.usefixtures("programs_compiled_anew")

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed"
)
SMALL = Workload(prompt=8, context=8, memory=256)


def tiny_places(family: str, mesh: jax.sharding.Mesh, dtype: str) -> Places:
    return Places(configure(tiny_settings(family)), mesh, dtype)


def programs_of(places: Places, edits: int = 16) -> list[Program]:
    return [*edit_programs(places, edits, workload=SMALL, every=True), *other_programs(places, SMALL)]


# --- lowering, for which no compiler is needed ---


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "bfloat16"), ("gptj", "float32"), ("gemma3", "bfloat16"), ("bert", "float32"), ("t5", "bfloat16")],
)
def test_every_program_lowers_for_a_tpu(family, dtype):
    places = tiny_places(family, jax.make_mesh((1, 1), ("data", "model")), dtype)
    lowered = set()
    for program in programs_of(places):
        # What a lane of many does, which all families lower; one of them tells that it lowers alone.
        if program.name.startswith("one fit") and family != "llama":
            continue
        text = program.function.trace(*program.args, **program.kwargs).lower(lowering_platforms=("tpu",)).as_text()
        # Neither a call of the host nor double precision, nor a factoring that a TPU has not.
        called = set(re.findall(r"custom_call @([\w.]+)", text))
        assert not [name for name in called if re.search("callback|lapack|eig|geev", name, re.IGNORECASE)], program.name
        assert "xf64>" not in text, program.name
        lowered.add(program.name)
    expected = {"last layer: keys, thresholds, first values", "paper's recipe: 25 steps", "memory: whitening"}
    if places.config.architecture != "decoder":
        expected |= {"inputs: trace", "inputs: resume"}
    else:
        expected |= {
            "subjects: keys",
            "values: steps",
            "ROME: solve",
            "generation: next token: block",
            "reading: block",
        }
    assert lowered >= expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_values_are_trained_by_products_of_the_precision_that_is_asked_for(precision):
    places = tiny_places("llama", jax.make_mesh((1, 1), ("data", "model")), "float32")
    settings = change(PRESETS["default"], {"value_precision": precision})
    rounded = {}
    for program in edit_programs(places, 4, settings, workload=SMALL):
        if program.name == "values: steps" or program.name.startswith("values, rows"):
            lowered = program.function.trace(*program.args, **program.kwargs).lower(lowering_platforms=("tpu",))
            products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
            rounded[program.name] = any("bf16>" in line for line in products)
    for name in ("values: steps", "values, rows up to the layer: block", "values, rows behind the layer: block"):
        assert rounded.pop(name) is (precision == "bfloat16")
    # In the layer itself, where queries are read, nothing is rounded.
    assert rounded
    assert not any(rounded.values())


def test_a_large_positive_system_is_a_loop_on_a_tpu_and_the_library_elsewhere():
    matrix, columns = jax.ShapeDtypeStruct((1024, 1024), jnp.float32), jax.ShapeDtypeStruct((1024, 4), jnp.float32)
    traced = jax.jit(solve_positive).trace(matrix, columns)
    assert "while" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "while" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("count", [5, 128, 300])
def test_positive_systems_in_blocks_are_solved(count):
    rng = np.random.default_rng(count)
    rows = rng.normal(size=(count, 2 * count))
    matrix = rows @ rows.T / count + 0.1 * np.eye(count)
    columns = rng.normal(size=(count, 3)).astype(np.float32)
    wanted = np.linalg.cholesky(matrix)
    factor = cholesky_in_blocks(jnp.asarray(matrix, jnp.float32))
    np.testing.assert_allclose(factor, wanted, atol=1e-5)
    np.testing.assert_allclose(cholesky(jnp.asarray(matrix, jnp.float32)), wanted, atol=1e-5)
    for transposed, triangle in ((False, wanted), (True, wanted.T)):
        solved = solve_lower_in_blocks(factor, columns, transposed=transposed)
        np.testing.assert_allclose(solved, np.linalg.solve(triangle, columns), atol=1e-4)
    # What stands above the diagonal is not read.
    np.testing.assert_array_equal(solve_lower_in_blocks(factor + jnp.triu(jnp.ones_like(factor), 1), columns),
                                  solve_lower_in_blocks(factor, columns))  # fmt: skip


def test_what_is_not_positive_is_not_a_number_in_blocks_either():
    assert np.isnan(np.asarray(cholesky_in_blocks(-jnp.eye(3)))).any()


# --- what a program costs, from its text ---

TEXT = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %w = f32[16,16]{1,0:T(8,128)S(1)} constant({...})
  %y = f32[8,16]{1,0:T(8,128)S(1)} convolution(%x, %w), dim_labels=bf_io->bf, operand_precision={highest,highest}
  %z = f32[8,16]{1,0:T(8,128)} all-reduce(%y), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%i, %z)
}

%condition (p.1: (s32[], f32[8,16])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} END
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

%taken (a: f32[100,64], b: s32[]) -> f32[1,64] {
  %a = f32[100,64]{1,0:T(8,128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,64]{1,0:T(1,128)} dynamic-slice(%a, %b, %zero), dynamic_slice_sizes={1,64}
}

ENTRY %main (table: f32[100,64], start: (s32[], f32[8,16]), at: s32[]) -> f32[1,64] {
  %table = f32[100,64]{1,0:T(8,128)} parameter(0)
  %start = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(1)
  %at = s32[]{:T(128)} parameter(2)
  %loop = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  ROOT %row = f32[1,64]{1,0:T(1,128)} fusion(%table, %at), kind=kLoop, calls=%taken
}
"""
PRODUCT = 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    ("end", "trips", "rounds"), [("constant(7)", 3, 7), ("get-tuple-element(%p.1), index=0", 3, 3)]
)
def test_a_loop_counts_as_often_as_it_goes_round(end, trips, rounds):
    costs = program_costs(TEXT.replace("END", end), trips)
    assert (costs.flops, costs.passes) == (rounds * PRODUCT, 6 * rounds * PRODUCT)
    assert costs.collectives == (("all-reduce", float(rounds)),)
    # A ring of four sends three quarters twice.
    assert costs.collective_bytes == rounds * 8 * 16 * 4 * 2 * 3 / 4


BY_AXIS = {
    "replica_groups=[2,4]<=[8]": (4, "model"),
    "replica_groups=[4,2]<=[2,4]T(1,0)": (2, "data"),
    "replica_groups=[1,8]<=[8]": (8, "data, model"),
    "replica_groups={{0,1,2,3},{4,5,6,7}}": (4, "model"),
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": (2, "data"),
    "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}": (2, "data"),
    "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_1','axis_2'}": (4, "model"),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}": (8, "data, model"),
    "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}": (4, "model"),
    "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}": (2, "data"),
}
"""How XLA writes between which of 2 x 4 devices an exchange goes; how many that is, and along which axes."""


@pytest.mark.parametrize("groups", BY_AXIS)
def test_an_exchange_is_counted_along_its_axes(groups):
    size, along = BY_AXIS[groups]
    text = TEXT.replace("END", "constant(1)").replace("replica_groups=[2,4]<=[8]", groups)
    costs = program_costs(text, axes={"data": 2, "model": 4})
    assert costs.collective_bytes == 8 * 16 * 4 * 2 * (size - 1) / size
    assert costs.over == ((along, costs.collective_bytes),)
    assert program_costs(text).over == ()


def test_what_a_device_keeps_for_itself_is_not_sent():
    pairs = "source_target_pairs={{0,0},{1,4},{4,1}}"
    text = TEXT.replace("END", "constant(1)").replace("all-reduce(%y)", "collective-permute(%y)")
    text = text.replace("replica_groups=[2,4]<=[8]", pairs)
    assert dict(program_costs(text, axes={"data": 2, "model": 4}).over) == {"data, model": 8 * 16 * 4}


def test_only_what_goes_through_memory_is_traffic_and_of_a_slice_the_slice():
    text = TEXT.replace("END", "constant(1)")
    # x is read; w and y stay on the chip; one row is read and written, its place is read; so are the loop's counters.
    row, counters = 64 * 4, 4 + 4 + 1
    assert program_costs(text).bytes == 8 * 16 * 4 + 2 * row + 4 + counters
    assert program_costs(text.replace("convolution(%x, %w)", "convolution(%w, %w)")).bytes < program_costs(text).bytes


def test_products_in_a_batch_written_as_a_convolution_count_once_for_each_of_the_batch():
    line = (
        "ENTRY %main (a: f32[4,8,2,128], b: f32[4,8,8,128]) -> f32[4,8,2,8] {\n"
        "  %a = f32[4,8,2,128]{3,2,1,0} parameter(0)\n  %b = f32[4,8,8,128]{3,2,1,0} parameter(1)\n"
        "  ROOT %c = f32[4,8,2,8]{3,2,1,0} convolution(%a, %b), window={size=4x8 stride=3x7 lhs_dilate=4x8}, "
        "dim_labels=01bf_01oi->01bf\n}\n"
    )
    assert program_costs(line).flops == 2 * 4 * 8 * 2 * 8 * 128


def test_a_product_that_a_gpu_s_library_does_counts():
    line = (
        "ENTRY %main (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {\n"
        "  %a = f32[8,16]{1,0} parameter(0)\n  %b = f32[16,4]{1,0} parameter(1)\n"
        '  %c = (f32[8,4]{1,0}, s8[33]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
        '"rhs_contracting_dimensions":["0"]}}}\n'
        "  ROOT %d = f32[8,4]{1,0} get-tuple-element(%c), index=0\n}\n"
    )
    assert program_costs(line).flops == 2 * 8 * 16 * 4
    assert program_costs(line.replace("__cublas$gemm", "sort")).flops == 0


def test_the_roofline_is_the_longest_side():
    chip = Chip(flops=10.0, bandwidth=5.0, memory=1.0, interconnect=2.0)
    assert roofline(ProgramCosts(10.0, 20.0, 5.0, 2.0), chip) == (2.0, "compute")
    assert roofline(ProgramCosts(10.0, 10.0, 50.0, 2.0), chip) == (10.0, "memory")
    assert roofline(ProgramCosts(10.0, 10.0, 5.0, 40.0), chip) == (20.0, "interconnect")


# --- shapes and the command ---


@pytest.mark.parametrize(
    ("name", "billions", "parts"),
    [("GPT-J-6B", 6.05, 2), ("llama-3-8b", 8.03, 4), ("Qwen3-8B", 8.19, 4), ("gemma-3-12b", 11.77, 4)],
)
def test_named_shapes_have_as_many_parameters_as_the_models(name, billions, parts):
    known, config = network_shape(name)
    assert known in SHAPES
    from tpatch_jax.models.shapes import parameter_shapes

    total = sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(config)))
    assert total / 1e9 == pytest.approx(billions, abs=0.01)
    eight = Topology("v5e:2x4", CHIPS["v5e"], tuple(range(8)), 2)
    assert split_weights(config, eight, "bfloat16") == parts
    assert split_weights(config, eight._replace(devices=(0,)), "bfloat16") == 1


def test_values_are_planned_with_as_many_steps_as_the_settings_allow():
    places = tiny_places("llama", jax.make_mesh((1, 1), ("data", "model")), "float32")

    def looks(settings: TPatcherSettings) -> int:
        programs = programs_module._subject_programs(places, 4, settings, SMALL)
        return next(program.trips for program in programs if program.name == "values: steps")

    default = PRESETS["default"]
    assert looks(default) == default.subject.value.steps + 1 == 11
    assert looks(change(default, {"subject.value.steps": 3})) == 4


def test_a_command_names_every_program(tmp_path, capsys):
    write_tiny_folder(make_tiny_model(max_position_embeddings=64), tmp_path / "tiny")
    arguments = ["bench", str(tmp_path / "tiny"), "--plan", "--programs"]
    assert cli.main([*arguments, "--json"]) == 0
    programs = json.loads(capsys.readouterr().out.splitlines()[-1])["programs"]
    names = {program["name"].split(":")[0] for program in programs}
    assert names >= {
        "reading", "memory", "last layer", "one fit, staged", "one fit, joint", "paper's recipe", "subjects", "values",
        "ROME", "MEMIT", "AlphaEdit", "GRACE", "SERAC", "generation", "fine-tuning", "evaluation",
    }  # fmt: skip
    assert next(each["runs"] for each in programs if each["name"] == "subjects: keys") == {"subject": 1.0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--programs"], "--plan"),
        (["--plan", "--programs", "--topology", "v5e:2x4"], "--programs compiles nothing"),
        (["--device", "--plan"], "--device goes without --plan"),
        (["--device", "--output", "a.png"], "--device goes without --output"),
        (["--device", "--edits", "0"], "--edits is 0"),
        (["--topology", "v5e:2x4"], "--plan"),
        (["--plan", "--every"], "--topology"),
        (["--plan", "--edits", "3"], "--topology"),
        (["gpt-5", "--plan", "--topology", "v5e:2x4"], "Llama-3-8B"),
        (["Llama-3-8B", "--plan", "--topology", "h100"], "v5e:2x4"),
        (["Llama-3-8B", "--plan", "--topology", "v9:2x4"], "v5e:2x4"),
        (["Llama-3-8B", "--plan", "--topology", "v5e:0x4"], "v5e:2x4"),
        (["Llama-3-8B", "--plan", "--topology", "v5e:2x4", "--edits", "0"], "--edits"),
        (["Llama-3-8B", "--plan", "--topology", "v5e:2x4", "--quick"], "--quick"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, said, capsys):
    assert cli.main(["bench", *arguments]) != 0
    assert said in capsys.readouterr().err


def test_without_libtpu_the_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "Llama-3-8B", "--plan", "--topology", "v5e:2x4"]) != 0
    assert 'pip install "libtpu>=' in capsys.readouterr().err


def test_devices_that_do_not_divide_are_refused():
    with pytest.raises(TPatchError, match="divisor of 8"):
        create_mesh(Topology("v5e:2x4", CHIPS["v5e"], tuple(range(8)), 2), 3)


# --- compiled ---


@pytest.fixture(scope="module")
def eight():
    return describe_topology("v5e:2x4")


@needs_libtpu
def test_every_program_of_an_edit_compiles_for_eight_chips(eight):
    places = tiny_places("llama", create_mesh(eight, 4), "bfloat16")
    rows = compile_programs(programs_of(places), places.params, eight)
    assert not [(row["name"], row["error"]) for row in rows if not row["compiled"]]
    for row in rows:
        assert row["fits"]
        assert row["memory_bytes_per_chip"] > 0
        assert row["seconds"] > 0
        assert sum(row["collective_bytes_over"].values()) == pytest.approx(row["collective_bytes"])
    assert len(rows) > 40
    over = {row["name"]: " ".join(row["collective_bytes_over"]) for row in rows}
    # No step on a value asks another part of the mesh, neither at subjects nor in the last layer.
    assert "data" not in over["values: steps"] + over["last layer: steps on values"]
    assert "model" in over["values: steps"]
    assert "unknown" not in " ".join(over.values())
    assert jax.devices()[0].platform == "cpu"


@needs_libtpu
@pytest.mark.parametrize(("name", "hosts", "devices"), [("v6e:1x1", 1, 1), ("v5e:4x4", 4, 16)])
def test_one_chip_and_several_hosts(name, hosts, devices):
    described = describe_topology(name)
    assert (described.hosts, len(described.devices)) == (hosts, devices)
    places = tiny_places("llama", create_mesh(described), "float32")
    wanted = {"last layer: what is said", "reading: block", "memory: whitening"}
    programs = [program for program in edit_programs(places, 16, workload=SMALL) if program.name in wanted]
    rows = compile_programs(programs, places.params, described)
    assert [row["compiled"] for row in rows] == [True] * 3


@needs_libtpu
@pytest.mark.parametrize("family", ["gemma3", "t5"])
def test_trace_and_resume_compile_whole(family, eight):
    places = tiny_places(family, create_mesh(eight, 2), "bfloat16")
    config, tokens = places.config, places.rows((8, 8), jnp.int32)
    batch = networks.Pair(tokens, tokens) if config.encoder else tokens

    def run(params, batch):
        traced = networks.trace(config, params, batch, 1)
        return networks.resume(config, params, traced, traced.output)

    assert compile_lowered(jax.jit(run), places.params, batch).flops > 0


@needs_libtpu
def test_products_are_counted_as_the_compiler_counts_them(eight):
    mesh = create_mesh(eight, 4)
    left, right = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((64, 512), PartitionSpec("data")), ((512, 1024), PartitionSpec(None, "model")))
    )
    compiled = compile_lowered(jax.jit(jnp.dot), left, right)
    costs = program_costs(compiled.text)
    assert costs.flops == 2 * 32 * 512 * 256
    assert costs.flops == pytest.approx(compiled.flops, rel=0.01)
    assert compiled.arguments == 2 * (32 * 512 + 512 * 256)
    assert not costs.collectives


@needs_libtpu
def test_the_command_prints_the_promised_json(tmp_path, monkeypatch, capsys):
    # Wide enough for a whole name in one line.
    monkeypatch.setenv("COLUMNS", "200")
    model = make_tiny_model(max_position_embeddings=64)
    write_tiny_folder(model, tmp_path / "tiny")
    several = edit_programs
    few = {"last layer: what is said", "reading: block", "values: what is said unedited", "reading: embeddings"}
    monkeypatch.setattr(
        compiled_plan,
        "edit_programs",
        lambda places, count, settings, every: [p for p in several(places, count, settings, SMALL) if p.name in few],
    )
    arguments = ["bench", str(tmp_path / "tiny"), "--plan", "--topology", "v6e:1x1", "--edits", "2", "4", "--json"]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    promised = {"name", "topology", "compiled", "memory_bytes_per_chip", "fits", "flops", "bytes", "seconds", "bound"}
    for row in result["programs"]:
        assert set(row) >= promised | {"collective_bytes"}
        assert row["compiled"]
        assert row["bound"] in ("compute", "memory", "interconnect")
    assert set(result["edits_per_second"]) == {"subject", "last"}
    assert all(value > 0 for value in result["edits_per_second"].values())
    assert set(result["plan"]["last"]) == {"2", "4"}
    assert cli.main(arguments[:-1]) == 0
    shown = capsys.readouterr().out
    assert "compiled, not run" in shown
    assert "reading: block" in shown


@needs_libtpu
def test_a_program_that_does_not_compile_is_a_row_that_says_why(eight):
    places = tiny_places("llama", create_mesh(eight), "float32")
    too_large = places.array((2**17, 2**17))
    program = Program("too large", jax.jit(lambda x: jnp.sort(x @ x)), (too_large,))
    row = compile_programs([program], places.params, eight)[0]
    assert not row["compiled"]
    assert not row["fits"]
    assert row["error"]
