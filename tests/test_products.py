"""Products of rounded numbers: what they round, what they leave alone, and what training with them gives."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpatch_jax.core import products
from tpatch_jax.core.products import (
    in_float32,
    is_bfloat16_faster,
    round_inputs,
    round_matrices,
    round_products,
    round_tensor,
)


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def rounded(array: jax.Array) -> jax.Array:
    return array.astype(jnp.bfloat16).astype(jnp.float32)


X, W, V = draw(0, 5, 7), draw(1, 7, 6), draw(2, 6, 3)


def network(x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ W) @ V


def by_hand(x: jax.Array) -> jax.Array:
    return rounded(jnp.tanh(rounded(x) @ rounded(W))) @ rounded(V)


def close(left: jax.Array, right: jax.Array) -> bool:
    return bool(np.allclose(left, right, rtol=1e-5, atol=1e-5))


def test_each_product_is_of_rounded_numbers_and_its_sum_is_not():
    result = round_products(network)(X)
    assert result.dtype == jnp.float32
    assert close(result, by_hand(X))
    assert not close(result, network(X))


def test_slopes_are_of_rounded_products_as_well():
    slope = jax.grad(lambda x: round_products(network)(x).sum())(X)
    hidden = jnp.tanh(rounded(X) @ rounded(W))
    back = rounded(jnp.ones((5, 3))) @ rounded(V).T
    wanted = rounded(back * (1 - hidden**2)) @ rounded(W).T
    assert slope.dtype == jnp.float32
    assert close(slope, wanted)


def test_of_both_factors():
    both = jax.grad(lambda x, w: round_products(jnp.matmul)(x, w).sum(), argnums=(0, 1))(X, W)
    assert close(both[0], jnp.ones((5, 6)) @ rounded(W).T)
    assert close(both[1], rounded(X).T @ jnp.ones((5, 6)))


def test_a_constant_matrix_is_kept_as_it_was_multiplied_and_nothing_beside_it():
    _, pull = jax.vjp(round_products(network), X)
    kept = {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(pull)}
    assert {(W.shape, "bfloat16"), (V.shape, "bfloat16")} <= kept
    assert not {(W.shape, "float32"), (X.shape, "float32"), (X.shape, "bfloat16")} & kept


def test_it_can_be_transformed():
    expected = round_products(network)(X)
    assert close(jax.jit(round_products(network))(X), expected)
    assert close(jax.vmap(round_products(network))(X), expected)
    assert close(round_products(jax.jit(network))(X), expected)
    assert close(round_products(jax.checkpoint(network))(X), expected)
    with jax.default_matmul_precision("highest"):
        assert close(round_products(network)(X), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.einsum("bi,bij->bj", x, jnp.stack([W] * 5)),  # batches on both sides
        lambda x: x.astype(jnp.float16) @ W.astype(jnp.float16),
        lambda x: jax.lax.fori_loop(0, 2, lambda _, y: y @ W @ W.T, x),
        lambda x: x[:, 0] + jax.nn.logsumexp(x, -1),
    ],
    ids=["batches", "float16", "a loop", "no product"],
)
def test_what_it_leaves_alone(function):
    assert np.array_equal(round_products(function)(X), function(X))


def test_trees_go_in_and_come_out():
    run = round_products(lambda params, x, scale: {"y": x @ params["w"] * scale, "same": x})
    result = run({"w": W}, X, scale=2.0)
    assert close(result["y"], rounded(X) @ rounded(W) * 2)
    assert np.array_equal(result["same"], X)


def test_matrices_alone_are_rounded():
    params = {"kernel": W, "bias": W[0], "half": W.astype(jnp.float16), "count": jnp.arange(4).reshape(2, 2)}
    half = round_matrices(params)
    assert {name: str(leaf.dtype) for name, leaf in half.items()} == {
        "kernel": "bfloat16", "bias": "float32", "half": "float16", "count": "int32",
    }  # fmt: skip
    back = in_float32(half)
    assert np.array_equal(back["kernel"], rounded(W))
    assert back["half"].dtype == jnp.float16


def test_a_matrix_in_int8_stays_as_it_is():
    pytest.importorskip("qwix")
    from tpatch_jax.core.int8 import quantise

    params = {"kernel": quantise(W, 1)}
    half = in_float32(round_matrices(params))
    assert all(map(np.array_equal, jax.tree.leaves(half), jax.tree.leaves(params)))
    assert [leaf.dtype for leaf in jax.tree.leaves(half)] == [leaf.dtype for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags : avx2 amx_bf16 amx_tile", True),
        ("flags : avx512f avx512_bf16", True),
        ("flags : avx2 avx512f avx512_vnni", False),
        (None, False),
    ],
)
def test_a_cpu_says_what_it_has(tmp_path, monkeypatch, text, expected):
    if jax.default_backend() != "cpu":
        pytest.skip("there is an accelerator here")
    facts = tmp_path / "cpuinfo"
    if text is not None:
        facts.write_text(text)
    monkeypatch.setattr(products, "CPU_FACTS", facts)
    is_bfloat16_faster.cache_clear()
    try:
        assert is_bfloat16_faster() is expected
    finally:
        is_bfloat16_faster.cache_clear()


@pytest.mark.parametrize(
    ("backend", "capability", "expected"),
    [
        ("tpu", None, True),
        ("gpu", "9.0", True),
        ("gpu", "10.0", True),
        ("gpu", "7.5", False),
        ("gpu", "gfx942", True),
        ("gpu", "gfx1100", False),
        ("gpu", None, False),
        ("METAL", None, False),
    ],
)
def test_an_accelerator_says_what_it_has(monkeypatch, backend, capability, expected):
    device = SimpleNamespace(**({} if capability is None else {"compute_capability": capability}))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    is_bfloat16_faster.cache_clear()
    try:
        assert is_bfloat16_faster() is expected
    finally:
        is_bfloat16_faster.cache_clear()


def test_an_array_in_equal_steps_of_which_zero_is_one():
    x = np.asarray(X)
    step = (x.max() - x.min()) / 127
    low = np.round(-x.min() / step)
    wanted = (np.clip(np.round(x / step) + low, 0, 127) - low) * step
    for round_one in (round_tensor, jax.jit(round_tensor)):
        assert close(round_one(X, 127.0), jnp.asarray(wanted))
    assert np.array_equal(round_tensor(X, 0.0), X)
    assert np.array_equal(round_tensor(jnp.zeros(3), 127.0), jnp.zeros(3))
    # all above zero: zero is a step all the same
    assert round_tensor(jnp.array([2.0, 4.0]), 4.0).tolist() == [2.0, 4.0]
    each = jax.vmap(lambda row: round_tensor(row, 7.0))(X)
    assert close(each, jnp.stack([round_tensor(row, 7.0) for row in X]))


def test_what_matrices_read_is_rounded_and_nothing_else():
    rows = X[None]

    def attend(x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ W) @ V + jnp.sum(x @ x.swapaxes(1, 2))

    def by_hand(x: jax.Array) -> jax.Array:
        return round_tensor(jnp.tanh(round_tensor(x, 15.0) @ W), 15.0) @ V + jnp.sum(x @ x.swapaxes(1, 2))

    assert close(round_inputs(attend, 15.0)(rows), by_hand(rows))
    assert close(jax.jit(lambda x: round_inputs(attend, 15.0)(x))(rows), by_hand(rows))
    assert close(round_inputs(attend, 0.0)(rows), attend(rows))
