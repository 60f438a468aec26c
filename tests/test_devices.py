"""Several devices and several processes make the patches that one device makes, and each holds its part only."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import make_tiny_model, relative, write_tiny_folder
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from tpatch_jax.core import devices
from tpatch_jax.core import fit as fitting
from tpatch_jax.core.fit import FitSettings, _over_devices
from tpatch_jax.core.memory import create_memory, extend
from tpatch_jax.errors import TPatchError
from tpatch_jax.storage import processes

SCRIPT = Path(__file__).parent / "on_devices.py"


def start(folder: Path, name: str, count: int, *more: str) -> subprocess.Popen[str]:
    """`on_devices` in a process of its own that has ``count`` devices."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH")])),
    }
    arguments = [sys.executable, str(SCRIPT), str(folder / "tiny"), str(folder / "text.txt"), str(folder / name), *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Iterator[dict[str, Any]]:
    """The same edits on one device and on eight, and on two processes of four."""
    folder = tmp_path_factory.mktemp("devices")
    write_tiny_folder(make_tiny_model(max_position_embeddings=512, hidden_size=64), folder / "tiny")
    # Neither the lanes nor the memory's rows are a multiple of eight.
    letters = np.random.default_rng(3).choice(list("abcdfgjklmopqrsuvwxyz0123456789"), 8 * 64 - 10)
    (folder / "text.txt").write_text("".join(letters), "utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    running = [start(folder, "two", 4, "4x2", f"{number}:{port}") for number in "01"]
    try:
        alone = finish(start(folder, "one", 8, "alone", "8x1"))
        yield {"folder": folder, **alone, **finish(running[0])}
        finish(running[1])
    finally:
        for process in running:
            process.kill()
            process.communicate()


def arrays(found: dict[str, Any], name: str) -> dict[str, np.ndarray]:
    return load_file(found["folder"] / name)


@pytest.mark.parametrize("other", ["one/8x1", "two/4x2"])
def test_the_patches_are_those_of_one_device(found, other):
    one, many = (arrays(found, f"{name}/patches/patches.safetensors") for name in ("one/alone", other))
    assert one["key"].shape == (11, 64)
    for name, array in one.items():
        for mine, alone in zip(many[name], array, strict=True):
            assert relative(mine, alone) < 1e-5
    for run in ("alone", "8x1", "4x2"):
        assert found[run]["held"] == [True] * 5
        assert found[run]["exact"] == 1.0


@pytest.mark.parametrize("other", ["one/8x1", "two/4x2"])
def test_a_sharded_model_is_saved_whole(found, other):
    one, many = (arrays(found, f"{name}/model/model.safetensors") for name in ("one/alone", other))
    assert one.keys() == many.keys()
    for name, array in one.items():
        assert relative(many[name], array) < 1e-5
    settings = [json.loads((found["folder"] / name / "model/config.json").read_text()) for name in ("one/alone", other)]
    assert settings[0] == settings[1]


def test_every_device_holds_its_part_of_lanes_and_memory(found):
    assert found["alone"]["seen"] == {"lanes": [2, 2] * 6, "rows": [1518, 1518] * 6}
    # Eleven lanes go together as sixteen, two on each device; 1,518 rows as 1,520. A last part is as large.
    assert found["8x1"]["seen"] == {"lanes": [2, 16], "rows": [190, 1520]}
    # Four groups of two devices that share the weights: each group has a quarter.
    assert found["4x2"]["seen"] == {"lanes": [2, 8] * 2, "rows": [380, 1520] * 2}


@pytest.mark.parametrize("other", ["8x1", "4x2"])
def test_values_are_those_of_one_device_and_each_device_trains_its_part(found, other):
    one, many = found["alone"]["values"], found[other]["values"]
    assert len(set(one["steps"])) > 2  # so lanes are dropped on the way, and devices end at different times
    assert many["steps"] == one["steps"]
    for name in ("values", "loss", "closeness"):
        assert relative(np.asarray(many[name]), np.asarray(one[name])) < 1e-5
    assert one["shapes"][0] == [16, 16]
    assert many["shapes"][0] == [16, 16 // int(other[0])]
    # Two lanes of a device go on together; of four, some are dropped.
    assert (len(many["shapes"]) > 1) == (other == "4x2")


PAIRS = {"{{0,1},{2,3},{4,5},{6,7}}", "{{1,0},{3,2},{5,4},{7,6}}", "[4,2]<=[8]"}
"""Devices 0 and 1 share the weights, 2 and 3 do, and so on."""


def test_steps_on_values_in_the_last_layer_exchange_nothing_over_data(found):
    one = found["alone"]["improved"]
    assert len(set(one["steps"])) > 2
    for other in ("8x1", "4x2"):
        many = found[other]["improved"]
        assert many["steps"] == one["steps"]
        assert relative(np.asarray(many["values"]), np.asarray(one["values"])) < 1e-5
    assert one["groups"] == found["8x1"]["improved"]["groups"] == []
    assert found["4x2"]["improved"]["groups"]
    assert set(found["4x2"]["improved"]["groups"]) <= PAIRS


def test_no_step_on_values_exchanges_anything_over_data(found):
    assert found["alone"]["values"]["groups"] == found["8x1"]["values"]["groups"] == []
    assert found["4x2"]["values"]["groups"]
    assert set(found["4x2"]["values"]["groups"]) <= PAIRS


def test_explicit_and_automatic_axes_give_the_same(found):
    assert set(found["axes"]) == {
        f"{kind} {how}" for kind in ("Auto", "Explicit") for how in ("loaded", "own", "arrays")
    }
    assert all(difference < 1e-5 for difference in found["axes"].values())


def test_one_device_changes_nothing():
    settings, memory = FitSettings(), create_memory(np.ones((3, 2), np.float32))
    assert _over_devices(settings, memory, None) == (settings, memory)
    assert devices.mesh_of({"kernel": np.ones(2)}) is None
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    assert devices.mesh_of(jax.device_put(np.ones(2), NamedSharding(mesh, PartitionSpec()))) is None
    assert devices.shard_rows(memory, None) is memory
    with pytest.raises(TPatchError, match="joint recipe is not split over devices; use recipe=staged"):
        _over_devices(FitSettings(recipe="joint"), memory, mesh)


def test_any_number_of_devices_shares_the_lanes(monkeypatch):
    monkeypatch.setattr(fitting, "parts", lambda mesh: 3)
    memory = create_memory(np.ones((3, 2), np.float32))
    assert _over_devices(FitSettings(lanes=2), memory, jax.make_mesh((1,), ("data",)))[0].lanes == 6


def test_the_last_rows_do_not_move():
    """Rows that fill the last device's part stand behind all others, so that no row's block changes."""
    memory = extend(create_memory(np.ones((3, 2), np.float32)), np.zeros((1, 2)), np.array([7]))
    mesh = jax.make_mesh((1,), ("data",))
    settings, spread = _over_devices(FitSettings(lanes=4), memory, mesh)
    assert settings.lanes == 4
    np.testing.assert_array_equal(spread.query, memory.query)
    assert devices.automatic(mesh).axis_types == (AxisType.Auto,)


def test_a_taken_folder_is_said_before_anything_is_written(tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    with pytest.raises(TPatchError, match="already exists"), processes.one_process_writes(taken):
        pass
    with processes.one_process_writes(tmp_path / "new") as writes:
        assert writes
