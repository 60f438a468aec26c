"""What a generated token costs once a model is edited, and the one table of all methods."""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from conftest import write_tiny_folder
from test_evaluation import make_records, write_counterfact
from tyro.conf import FlagCreatePairsOff

from tpatch_jax import TPatchError
from tpatch_jax.cli.main import main
from tpatch_jax.cli.rivals import Rivals, parse_command
from tpatch_jax.cli.serac_train import SeracTrain
from tpatch_jax.core.flops import count_flops
from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.base import Routing
from tpatch_jax.editors.registry import METHODS
from tpatch_jax.evaluation.rivals import FULL, QUICK, ROWS, as_markdown, cells, fill_table
from tpatch_jax.evaluation.token_costs import ANSWER, answer_flops, token_costs
from tpatch_jax.models.model import Model
from tpatch_jax.storage.files import write_text

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

CONFIGS = str(Path(__file__).parents[1] / "configs" / "smollm2-135m")


# --- FLOPs ---


def test_flops_are_those_of_the_products_that_the_result_needs() -> None:
    a, b, c = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 5), (5, 7), (50, 50)))
    assert count_flops(lambda a, b: a @ b, a, b) == 2 * 3 * 5 * 7
    assert count_flops(lambda a, b: (a @ b) @ b.T, a, b) == 4 * 3 * 5 * 7
    assert count_flops(lambda a, b, c: (a @ b, c @ c)[0], a, b, c) == 2 * 3 * 5 * 7
    assert count_flops(lambda a: {"same": a}, np.ones((3, 5), np.float32)) == 0


def test_an_answer_costs_its_prompt_and_its_tokens(tiny_model: Model) -> None:
    kernels = [leaf for leaf in jax.tree.leaves(tiny_model.params["layers"]) if leaf.ndim == 2]
    products = 2 * sum(leaf.size for leaf in kernels)
    head = 2 * tiny_model.params["head"]["kernel"].size
    said = answer_flops(tiny_model, 20) - answer_flops(tiny_model, 20, tokens=1)
    # Attention over the prompt and what is written, norms and softmax are small beside the vocabulary.
    assert (ANSWER - 1) * (products + head) < said < 1.8 * (ANSWER - 1) * (products + head)


def costs(model: Model, edited: Model, patches: Any = None, routing: Routing | None = None) -> dict[str, float]:
    about, elsewhere = [[5, 6, 7, 8, 9], [5, 6, 7]], [[9] * 9]
    return token_costs(model, edited, patches, routing, about, elsewhere)


def test_changed_weights_cost_nothing(tiny_model: Model) -> None:
    other = tiny_model.with_params(jax.tree.map(lambda leaf: leaf + 1, tiny_model.params))
    figures = costs(tiny_model, other)
    assert figures.pop("token_flops") == answer_flops(tiny_model, 5) / ANSWER
    assert figures == {"token_forward_equivalents": 1.0, "token_forward_equivalents_elsewhere": 1.0}
    assert token_costs(tiny_model, other, None, None, [], []) == {}


def test_neurons_cost_their_two_products_at_every_token(tiny_model: Model) -> None:
    count, width = 512, 16
    patch = Patch(jnp.ones((count, width)), jnp.zeros(count), jnp.ones((count, width)))
    figures = costs(tiny_model, tiny_model, {1: patch})
    added = 4 * count * width * (5 + ANSWER - 1)
    more = (figures["token_forward_equivalents"] - 1) * answer_flops(tiny_model, 5)
    # A bias and a threshold of each neuron besides.
    assert added <= more < 1.1 * added


def test_what_is_routed_costs_the_decision_and_a_longer_prompt(tiny_model: Model) -> None:
    # Of the two prompts of edits one is retrieved, behind four tokens; elsewhere none.
    contexts = lambda prompts: [[1, 2, 3, 4] if len(row) == 3 else None for row in prompts]  # noqa: E731
    figures = costs(
        tiny_model, tiny_model, routing=Routing(tiny_model, contexts, decision_flops=lambda row: 1000.0 * len(row))
    )
    before, longer = answer_flops(tiny_model, 5), answer_flops(tiny_model, 9)
    assert figures["token_flops"] * ANSWER == pytest.approx(5000 + before / 2 + longer / 2, rel=1e-12)
    assert figures["token_forward_equivalents"] == pytest.approx((5000 + before / 2 + longer / 2) / before, rel=1e-12)
    there = answer_flops(tiny_model, 9)
    assert figures["token_forward_equivalents_elsewhere"] == pytest.approx((9000 + there) / there, rel=1e-12)
    # A smaller model that answers makes it cheaper.
    config = dataclasses.replace(tiny_model.config, layers=1, windows=tiny_model.config.windows[:1])
    small = dataclasses.replace(tiny_model, config=config)
    figures = costs(tiny_model, tiny_model, routing=Routing(small, lambda prompts: [[] for _ in prompts]))
    assert figures["token_forward_equivalents"] == pytest.approx(answer_flops(small, 5) / before, rel=1e-12)
    assert figures["token_forward_equivalents"] < 1


# --- the table ---


def test_every_cell_is_a_command_of_its_configuration(tmp_path: Path) -> None:
    for part in FULL:
        (tmp_path / part.file).write_text("[]", "utf-8")
    chosen = cells((*FULL, *QUICK), list(ROWS), CONFIGS, tmp_path / "out")
    methods = set()
    for cell in chosen:
        command = parse_command(cell.arguments("m", tmp_path, ("--set", "layer=3")))
        options, changes = command.settle()
        assert command.output == str(tmp_path / "out" / cell.part.name / cell.row)
        assert (options["data"], options["protocol"], options["n"]) == cell.part[1:2] + cell.part[3:5]
        assert options["method"] == cell.row.removesuffix("-aligned").removesuffix("-subject")
        methods.add(options["method"])
        assert changes["layer"] == 3
        assert changes.get("aligned", False) == (cell.row == "memit-aligned")
    assert [cell.part.name for cell in chosen if cell.row == "memit-aligned"] == ["counterfact-sequential"]
    # Fourteen methods, T-Patcher at two sites, MEMIT in two kinds of steps.
    assert len(methods & set(METHODS)) == len(methods) == 14
    assert len(ROWS) == 16


def write_cell(cell: Any, exact: float) -> None:
    """A report as small as can be."""
    shared = {"protocol": cell.part.protocol, "moment": "", "n": cell.part.n}
    cost = {"forward_equivalents": 5.0, "token_forward_equivalents": 1.25, "parameters_added": 12345}
    properties = {"undo": "exact", "stock_checkpoint": False}
    results = [
        {**shared, "method": "unedited", "metrics": {"exact": 0.0}, "cost": {"token_forward_equivalents": 1.0}},
        {**shared, "method": cell.row, "metrics": {"exact": exact, "perplexity": 44.04}, "cost": cost}
        | {"properties": properties},
    ]
    cell.folder.mkdir(parents=True)
    # In one piece, as evaluations write it: a table may be read meanwhile.
    write_text(cell.folder / "report.json", json.dumps({"schema": 1, "config": {}, "results": results}))


def test_a_table_goes_on_and_what_fails_does_not_stop_it(tmp_path: Path) -> None:
    chosen, seen, broken = cells(QUICK, ["rome", "grace", "wise"], CONFIGS, tmp_path), [], True

    def measure(cell: Any) -> None:
        seen.append(cell.row)
        if broken and cell.row == "grace":
            raise TPatchError("something is amiss; mend it")
        if cell.row == "wise" and len(seen) == 3:
            raise KeyboardInterrupt
        write_cell(cell, 1.0 if cell.row == "rome" else 0.875)

    with pytest.raises(KeyboardInterrupt):
        fill_table(chosen, measure, QUICK, tmp_path)
    assert seen == ["rome", "grace", "wise"]
    begun = json.loads((tmp_path / "table.json").read_text("utf-8"))
    assert list(begun["results"]["counterfact-batch"]) == ["unedited", "rome"]
    assert begun["missing"] == {"counterfact-batch": {"grace": "something is amiss; mend it"}}
    assert "grace: something is amiss; mend it" in (tmp_path / "table.md").read_text("utf-8")
    broken = False
    table = fill_table(chosen, measure, QUICK, tmp_path)
    assert seen[3:] == ["grace", "wise"]
    assert not table.missing
    lines = as_markdown(table).splitlines()
    assert "| rome | 1.000 | 44 |" in lines
    assert "| wise | .875 | 44 |" in lines
    assert "| unedited | .000 |  |" in lines
    (line,) = (line for line in lines if line.startswith("| wise | 5 |"))
    assert line == f"| wise | 5 | 1.25 | 12,345 | exact | no | {ROWS['wise']} |"
    assert not any("peak memory" in line for line in lines)  # one process for all
    assert fill_table(chosen, measure, QUICK, tmp_path) == table
    assert len(seen) == 5
    # Rows that are not asked for stay in the table.
    assert fill_table(chosen[:1], measure, QUICK, tmp_path) == table


def test_a_table_is_of_one_kind_of_data_and_configurations(tmp_path: Path, monkeypatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("counterfact_full_dev.json", "wikitext-2-raw.test.txt"):
            (tmp_path / name / file).write_text(f"[{name!r}]", "utf-8")
    for row in ("ft", "ft-kl"):
        (tmp_path / f"own-{row}-counterfact.yaml").write_text("rate: 1\n", "utf-8")
    monkeypatch.setattr(Rivals, "measure", lambda self, cell, output, loaded: write_cell(cell, 0.5))

    def fill(data: str, rows: str) -> None:
        Rivals(
            "m", data=str(tmp_path / data), output=str(tmp_path / "out"), quick=True, rows=rows, n=7,
            configs=str(tmp_path / "own"), quiet=True,
        ).run()  # fmt: skip

    fill("a", "ft")
    with pytest.raises(TPatchError, match=r"out belongs to a run with data=.*choose another output folder"):
        fill("b", "ft-kl")
    fill("a", "ft-kl")
    assert "## counterfact, 7 records, batch" in (tmp_path / "out" / "table.md").read_text("utf-8")
    (tmp_path / "own-ft-counterfact.yaml").write_text("rate: 2\n", "utf-8")
    with pytest.raises(TPatchError, match=r"batch/ft was measured with another .*own-ft-counterfact.yaml; remove that"):
        fill("a", "ft")
    fill("a", "ft-kl")


def test_cells_are_measured_side_by_side(tmp_path: Path) -> None:
    chosen, seen = cells(QUICK, ["rome", "grace", "wise", "locft"], CONFIGS, tmp_path), []
    both = threading.Barrier(2, timeout=60)  # breaks unless two are there at once

    def measure(cell: Any) -> None:
        both.wait()
        if cell.row == "grace":
            raise TPatchError("something is amiss; mend it")
        write_cell(cell, 0.5)

    table = fill_table(chosen, measure, QUICK, tmp_path, lambda cell, number: seen.append((cell.row, number)), jobs=2)
    assert sorted(seen) == [("grace", 1), ("locft", 3), ("rome", 0), ("wise", 2)]
    assert list(table.results["counterfact-batch"]) == ["unedited", "rome", "locft", "wise"]
    assert table.missing == {"counterfact-batch": {"grace": "something is amiss; mend it"}}
    written = json.loads((tmp_path / "table.json").read_text("utf-8"))
    assert (written["results"], written["missing"]) == (table.results, table.missing)

    # What is no fault of a cell ends the table, and no further cell is begun.
    begun = []

    def interrupted(cell: Any) -> None:
        begun.append(cell.row)
        raise KeyboardInterrupt

    others = cells(QUICK, ["ft", "ft-kl", "memit", "alphaedit", "ultraedit", "neuraldb"], CONFIGS, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fill_table(others, interrupted, QUICK, tmp_path, lambda cell, number: time.sleep(number * 0.2), jobs=2)
    assert len(begun) < len(others)


def test_a_quick_table_of_a_tiny_model(tiny_model: Model, tmp_path: Path, capsys, monkeypatch, restored) -> None:
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "cache"))
    model, data = write_tiny_folder(tiny_model, tmp_path / "tiny"), tmp_path / "data" / "all"
    data.mkdir(parents=True)
    write_counterfact(data / "counterfact_full_dev.json", make_records())
    (data / "wikitext-2-raw.test.txt").write_text("The sun is red. Ada likes the sky. " * 20, "utf-8")
    command = ["rivals", str(model), "--data", str(data.parent), "--quick", "-n", "2", "--configs", CONFIGS]
    command += ["--rows", "grace,serac", "-o", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = told["results"]["counterfact-batch"]
    assert list(results) == ["unedited", "grace"]
    assert results["unedited"]["cost"]["token_forward_equivalents"] == 1.0
    cost = results["grace"]["cost"]
    # Eight entries, six of them padding, each compared with a query and read.
    assert 1 < cost["token_forward_equivalents"] < 1.2
    assert results["grace"]["properties"] == {"undo": "exact", "stock_checkpoint": False}
    assert told["reported"]["grace"] == ROWS["grace"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"run.json", "table.json", "table.md", "memory.txt", "counterfact-batch", "counterfact-batch.png"} == names
    # What is there is not measured again.
    monkeypatch.setattr(Rivals, "measure", None)
    assert main([*command[:-1], "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "serac is left out" in shown
    assert "table in" in shown
    # Figures of other records do not come into it, and no other folder is written to.
    assert main(["1" if word == "2" else word for word in command]) == 1
    assert "belongs to a run with n=[2], and this one has [1]" in capsys.readouterr().err
    assert main([*command[:-2], str(data)]) == 1
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--rows", "grace,grice"], "no row 'grice'; choose from ft, "),
        (["--rows", "serac", "--quick"], "networks have to be trained first; give --serac or --encoder"),
        (["--rows", "memit-aligned", "--quick"], "no row that this part measures"),
        (["-n", "0"], "-n 0 leaves no record"),
        (["--jobs", "0"], "--jobs 0: give 1 or more"),
        (["--jobs", "2", "--quick"], "--jobs 2: a quick table is made in one process; leave it out"),
        (["--configs", "nowhere/x"], "nowhere/x-ft-counterfact.yaml does not exist; give --configs"),
        (["--data", "nowhere"], "nowhere holds no counterfact_full_dev.json; give --data"),
    ],
)
def test_a_table_that_cannot_be(tmp_path: Path, capsys, changes: list[str], words: str) -> None:
    for name in ("counterfact_full_dev.json", "zsre_dev.json", "wikitext-2-raw.test.txt"):
        (tmp_path / name).write_text("[]", "utf-8")
    command = ["rivals", "nowhere", "--data", str(tmp_path), "--configs", CONFIGS, "-o", str(tmp_path / "out")]
    assert main([*command, *changes]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cells_of_a_whole_table_have_separate_processes(tmp_path: Path, capsys, monkeypatch) -> None:
    names = ("counterfact_full_dev.json", "counterfact_flat_dev.json", "zsre_dev.json", "wikitext-2-raw.test.txt")
    for name in (*names, "counterfact_flat_train.json", "knowedit_zsre_train.json"):
        (tmp_path / name).write_text("[]", "utf-8")
    told: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        told.append(command)
        if "serac-train" in command:
            folder = Path(command[command.index("-o") + 1])
            folder.mkdir()
            (folder / "serac.json").write_text("{}", "utf-8")
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, 1, "", "a warning\ntpatch: nothing is there; give something\n")

    monkeypatch.setattr("subprocess.run", run)
    command = ["rivals", "tiny", "--data", str(tmp_path), "--configs", CONFIGS, "-o", str(tmp_path / "out"), "--quiet"]
    parts = tuple(part.name for part in FULL)
    assert main([*command, "--rows", "ft"]) == 1
    said = capsys.readouterr().err
    assert f"3 of 3 cells failed ({', '.join(f'{part}: ft' for part in parts)})" in said
    assert "; the first: nothing is there; give something (`tpatch eval tiny --config" in said
    assert "the same command tries them again" in said
    assert [one[:4] for one in told] == [[sys.executable, "-m", "tpatch_jax.cli.main", "eval"]] * 3
    assert set(json.loads((tmp_path / "out" / "table.json").read_text("utf-8"))["missing"]) == set(parts)
    del told[:]
    assert main([*command, "--rows", "serac", "--encoder", "minilm"]) == 1
    networks = str(tmp_path / "out" / "serac")
    assert [one[3] for one in told] == ["serac-train", "eval", "eval", "eval"]
    trained = tyro.cli(SeracTrain, args=told[0][4:], config=(FlagCreatePairsOff,))
    assert (trained.output, trained.encoder, trained.most) == (networks, "minilm", 4000)
    assert f"zsre:{tmp_path / 'zsre_dev.json'}" in trained.exclude
    assert all(parse_command(one[3:]).settle()[1]["serac"] == networks for one in told[1:])
