"""The decoder: the cut at every layer, the cache, and patches at model level, on tiny random models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, relative, same, tiny_tokenizer, write_tiny_folder

from tpatch_jax.core import ffn
from tpatch_jax.core.layers import concatenate_layers, split_layers
from tpatch_jax.core.patch import Patch, create
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import generation, networks
from tpatch_jax.models.model import Model, load_model, save_model
from tpatch_jax.models.patching import attach, detach, merge, unmerge
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.models.shapes import merged_neurons, parameter_shapes

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "plain": {},
    "everything": {
        "tie_word_embeddings": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3,
    },
}
"""``test_parity.py`` and ``test_reference.py`` cover more of them, one by one."""
TEXTS = ["the cat in the hat", "in", "a hen then", "who is in there, then?"]
LAYERS = range(3)


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def model(request: pytest.FixtureRequest) -> Model:
    return make_tiny_model(3, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def rich() -> Model:
    return make_tiny_model(3, **VARIANTS["everything"])


def tokens_of(model: Model, length: int = 32) -> jax.Array:
    return tokens_array([model.encode(text) for text in TEXTS], length)


def lengths_of(model: Model) -> list[int]:
    return [len(model.encode(text)) for text in TEXTS]


def random_patch(seed: int, neurons: int, width: int = 16) -> Patch:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return Patch(draw(neurons, width), draw(neurons), 0.3 * draw(neurons, width))


def random_patches(seed: int, neurons: int, layers: tuple[int, ...]) -> dict[int, Patch]:
    """So many neurons in all, in turn in one layer and in the next."""
    return split_layers(random_patch(seed, neurons), [layers[n % len(layers)] for n in range(neurons)])


# --- the cut ---


@pytest.mark.parametrize("padding", [-100, -1, 0, 10**6])
def test_anything_may_stand_for_padding(model, padding):
    tokens = tokens_of(model)
    lengths = lengths_of(model)
    padded = jnp.where(jnp.arange(tokens.shape[1]) < jnp.asarray(lengths)[:, None], tokens, padding)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(model.apply(padded)[row, :length], model.apply(tokens)[row, :length])


@pytest.mark.parametrize("tokens", [[1, 2], np.array([1, 2])])
def test_tokens_that_are_no_table(model, tokens):
    with pytest.raises(TPatchError, match=r"the tokens are an? .*; give an array of token ids, \[batch, tokens\]"):
        model.trace(tokens)


@pytest.mark.parametrize("layer", LAYERS)
def test_resuming_from_any_cut_is_the_whole_network(model, layer):
    tokens = tokens_of(model)
    whole = model.apply(tokens)
    traced = model.trace(tokens, layer)
    assert traced.query.shape == traced.output.shape == (*tokens.shape, model.config.hidden_size)
    assert traced.layer == layer
    np.testing.assert_allclose(model.resume(traced, traced.output), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_cut_is_at_the_feed_forward_network(model, layer):
    traced = model.trace(tokens_of(model), layer)
    network = model.params["layers"][layer]["ffn"]
    assert relative(ffn.apply(network, traced.query, model.config.activation), traced.output) < 1e-6
    # what is resumed is the output that is given, not the one that was traced
    assert relative(model.resume(traced, 0 * traced.output), model.resume(traced, traced.output)) > 1e-3


@pytest.mark.parametrize("layer", LAYERS)
def test_another_output_at_one_position_reaches_only_what_follows(model, layer):
    tokens = tokens_of(model)
    traced = model.trace(tokens, layer)
    before = np.asarray(model.resume(traced, traced.output))
    after = np.asarray(model.resume(traced, traced.output.at[:, 5].add(1.0)))
    np.testing.assert_array_equal(after[:, :5], before[:, :5])
    assert np.abs(after[:, 5] - before[:, 5]).max() > 1e-3
    later = np.abs(after[:, 6:] - before[:, 6:]).max()
    assert later == 0 if layer == LAYERS[-1] else later > 1e-4


def test_a_later_token_changes_nothing_before_it_and_something_after(model):
    tokens = tokens_of(model)
    other = tokens.at[:, 9].set(7)
    before, after = np.asarray(model.apply(tokens)), np.asarray(model.apply(other))
    np.testing.assert_array_equal(after[:, :9], before[:, :9])
    assert np.abs(after[:, 10:] - before[:, 10:]).max() > 1e-4


def test_the_order_of_tokens_matters(model):
    # without positions the last of "x y … z" and "y x … z" would see the same set
    one, other = model.encode("the cat sat"), model.encode("the cat sat")
    other[0], other[1] = other[1], other[0]
    last = np.asarray(model.apply(tokens_array([one, other], len(one))))[:, -1]
    assert np.abs(last[0] - last[1]).max() > 1e-4


def test_right_padding_changes_nothing(model):
    wide = np.asarray(model.apply(tokens_of(model)))
    for lane, text in enumerate(TEXTS):
        ids = model.encode(text)
        alone = np.asarray(model.apply(tokens_array([ids], 24)))[0]
        np.testing.assert_allclose(wide[lane, : len(ids)], alone[: len(ids)], rtol=1e-5, atol=1e-5)


def test_gathered_positions_of_the_last_layer_finish_as_the_whole(model):
    tokens = tokens_of(model)
    whole = np.asarray(model.apply(tokens))
    lane, place = jnp.asarray([0, 0, 1, 3]), jnp.asarray([0, 4, 1, 9])
    wanted = whole[np.asarray(lane), np.asarray(place)]
    traced = networks.gather(model.trace(tokens), lane, place)
    assert traced.query.shape == (4, 1, model.config.hidden_size)
    np.testing.assert_allclose(model.resume(traced, traced.output)[:, 0], wanted, rtol=1e-5, atol=1e-5)

    residual, output = traced.context["residual"][:, 0], traced.output[:, 0]
    weights = networks.final_weights(model.config, model.params)
    finished = networks.finisher(model.config)(weights, {"residual": residual}, output)
    np.testing.assert_allclose(finished, wanted, rtol=1e-5, atol=1e-5)
    stream = networks.leave_last(model.config, model.params, residual, output)
    np.testing.assert_allclose(networks.logits(model.config, model.params, stream), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(networks.argmax(model.config, model.params, stream), wanted.argmax(-1))
    assert networks.finisher(model.config) is networks.finisher(model.config)


def test_tying_shares_the_embedding_and_untying_does_not():
    tied, untied = make_tiny_model(tie_word_embeddings=True), make_tiny_model()
    assert "head" not in tied.params
    assert untied.parameter_count - tied.parameter_count == 300 * 16
    for model in (tied, untied):
        table = model.params["embed"]["embedding"] if model is tied else model.params["head"]["kernel"].T
        wanted = table * model.params["norm"]["scale"]
        np.testing.assert_array_equal(networks.unembedding(model.config, model.params), wanted)
    tokens = tokens_of(untied)
    kernel = untied.params["head"]["kernel"]
    scaled = untied.with_params({**untied.params, "head": {"kernel": 2 * kernel}})
    np.testing.assert_array_equal(scaled.apply(tokens), 2 * untied.apply(tokens))


def test_shapes_are_those_of_the_parameters(model):
    described = jax.tree.map(lambda leaf: leaf.shape, parameter_shapes(model.config))
    assert described == jax.tree.map(lambda leaf: leaf.shape, model.params)
    merged = merge(model, random_patches(0, 3, (1,)))
    assert merged_neurons(model.config, merged.params) == {1: 3}
    described = jax.tree.map(lambda leaf: leaf.shape, parameter_shapes(model.config, {1: 3}))
    assert described == jax.tree.map(lambda leaf: leaf.shape, merged.params)


# --- bfloat16 ---


def in_bfloat16(model: Model) -> Model:
    return model.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))


@pytest.mark.parametrize("layer", LAYERS)
def test_bfloat16_stays_bfloat16_up_to_the_logits(rich, layer):
    half, tokens = in_bfloat16(rich), tokens_of(rich)
    traced = half.trace(tokens, layer)
    floating = [traced.query, traced.output, traced.context["residual"]]
    assert [array.dtype for array in floating] == [jnp.bfloat16] * 3
    assert networks.hidden(half.config, half.params, traced, traced.output).dtype == jnp.bfloat16
    logits = half.resume(traced, traced.output)
    assert logits.dtype == jnp.float32
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half.params)
    assert relative(logits, rich.with_params(rounded).apply(tokens)) < 0.05


def test_bfloat16_keeps_its_cache_and_takes_float32_patches(rich):
    half, patch = in_bfloat16(rich), random_patch(0, 4)
    cache = networks.empty_cache(half.config, half.params, 2, 16)
    stream, cache = networks.decode(
        half.config, half.params, jnp.ones((2, 3), jnp.int32), jnp.broadcast_to(jnp.arange(3), (2, 3)), cache
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((stream, cache))} == {jnp.dtype(jnp.bfloat16)}
    tokens = tokens_of(rich)
    attached, merged = attach(half, patch), merge(half, patch)
    assert attached.trace(tokens).output.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(merged.params)} == {jnp.dtype(jnp.bfloat16)}
    assert relative(merged.apply(tokens), attached.apply(tokens)) < 0.05
    assert relative(attached.apply(tokens), half.apply(tokens)) > 1e-3
    assert len(half.generate("the cat", 4)) > 0


# --- generation ---


def slowly(model: Model, ids: list[int], count: int, stops: tuple[int, ...] = ()) -> list[int]:
    """Greedy decoding without a cache."""
    row = list(ids)
    for _ in range(count):
        table = tokens_array([row], 64)
        chosen = int(np.asarray(model.apply(table))[0, len(row) - 1].argmax())
        if chosen in stops:
            break
        row.append(chosen)
    return row[len(ids) :]


def test_the_cache_changes_no_token_and_lanes_do_not_mix(rich):
    rows = [rich.encode(text) for text in TEXTS]
    assert len(set(map(len, rows))) == len(rows)
    wanted = [slowly(rich, row, 12) for row in rows]
    assert len({tuple(found) for found in wanted}) > 1
    together = generation.greedy(rich.config, rich.params, rows, 12)
    assert together == wanted
    alone = [generation.greedy(rich.config, rich.params, [row], 12)[0] for row in rows]
    assert alone == wanted
    backwards = generation.greedy(rich.config, rich.params, rows[::-1], 12)
    assert backwards[::-1] == wanted


def test_generation_runs_patches_where_they_are(rich):
    patches = random_patches(5, 6, (0, 2))
    attached, rows = attach(rich, patches), [rich.encode(text) for text in TEXTS]
    wanted = [slowly(attached, row, 8) for row in rows]
    assert generation.greedy(attached.config, attached.params, rows, 8) == wanted
    assert wanted != [slowly(rich, row, 8) for row in rows]


def test_a_stop_ends_its_lane_only_and_is_not_returned(tiny_model):
    rows = [tiny_model.encode(text) for text in TEXTS]
    free = generation.greedy(tiny_model.config, tiny_model.params, rows, 10)
    stop = free[0][3]
    found = generation.greedy(tiny_model.config, tiny_model.params, rows, 10, (stop,))
    assert found == [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(found[0]) <= 3
    assert any(len(row) == 10 for row in found)


def test_the_tokenizer_s_and_the_configuration_s_stops_both_count(tiny_model):
    assert tiny_model.stops == (0,)
    assert make_tiny_model(eos_token_id=[5, 9]).stops == (0, 5, 9)
    assert make_tiny_model(eos_token_id=None).stops == (0,)


def test_generation_stops_at_the_end_of_the_context(tiny_model):
    context = tiny_model.config.context
    prompt = "a" * (context - 2)
    ids = tiny_model.encode(prompt)
    assert len(ids) == context - 2
    found = generation.greedy(tiny_model.config, tiny_model.params, [ids], 10)[0]
    assert found == slowly(tiny_model, ids, 2)


@pytest.mark.parametrize("count", [65, 200])
def test_a_prompt_longer_than_the_context_is_an_error_that_names_it(tiny_model, count):
    with pytest.raises(TPatchError, match=f"prompt 0 has {count} tokens, the model reads 64; shorten it"):
        tiny_model.generate("a" * count, 1)
    rows = [[1], [2] * count]
    with pytest.raises(TPatchError, match=f"prompt 1 has {count} tokens"):
        generation.greedy(tiny_model.config, tiny_model.params, rows, 1)


def test_an_empty_prompt_is_an_error(tiny_model):
    with pytest.raises(TPatchError, match="prompt 0 is empty"):
        tiny_model.generate("")
    with pytest.raises(TPatchError, match="prompt 1 is empty"):
        generation.greedy(tiny_model.config, tiny_model.params, [[1], []], 1)
    assert generation.greedy(tiny_model.config, tiny_model.params, [], 1) == []


def test_sampling_follows_its_key_and_stays_among_the_best(tiny_model):
    rows = [tiny_model.encode(text) for text in TEXTS]

    def draw(seed: int, **options: int) -> list[list[int]]:
        key = jax.random.key(seed)
        return generation.sample(tiny_model.config, tiny_model.params, rows, 8, key, **options)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    # one candidate only: the same as greedy
    assert draw(3, top_k=1) == generation.greedy(tiny_model.config, tiny_model.params, rows, 8)


def test_stops_of_each_prompt_end_its_own_lane(tiny_model):
    rows = [tiny_model.encode(text) for text in TEXTS[:2]]
    given = tiny_model.config, tiny_model.params, rows, 6
    free = generation.greedy(*given)
    stop = free[1][3]
    both = generation.greedy(*given, [(free[0][0],), (stop,)])
    assert both == [[], free[1][: free[1].index(stop)]]
    with pytest.raises(TPatchError, match="stops for 1 of 2 prompts; give those of each"):
        generation.greedy(*given, [(1,)])


def test_sampling_from_few_tokens_takes_all_of_them():
    few = make_tiny_model(vocab_size=30)
    (drawn,) = generation.sample(few.config, few.params, [[1, 2]], 8, jax.random.key(0), stops=(0,))
    assert set(drawn) <= set(range(30))


# --- patches ---


def test_merged_equals_attached_in_every_layer_at_once(rich):
    patches, tokens = random_patches(1, 6, (2, 0, 1)), tokens_of(rich)
    attached, merged = attach(rich, patches), merge(rich, patches)
    assert merged_neurons(rich.config, merged.params) == {0: 2, 1: 2, 2: 2}
    for layer in LAYERS:
        assert not ffn.attached(merged.params["layers"][layer]["ffn"])
    assert relative(merged.apply(tokens), attached.apply(tokens)) < 1e-5
    assert relative(attached.apply(tokens), rich.apply(tokens)) > 1e-2


@pytest.mark.parametrize("layer", LAYERS)
def test_merged_equals_attached_in_one_layer(rich, layer):
    patches, tokens = random_patches(2, 2, (layer,)), tokens_of(rich)
    attached, merged = attach(rich, patches), merge(rich, patches)
    assert relative(merged.apply(tokens), attached.apply(tokens)) < 1e-5
    assert relative(attached.apply(tokens), rich.apply(tokens)) > 1e-3
    # and it went there and nowhere else
    for other in LAYERS:
        whole = jax.tree.leaves(merged.params["layers"][other]["ffn"])
        assert same(whole, jax.tree.leaves(rich.params["layers"][other]["ffn"])) == (other != layer)


def test_one_patch_goes_into_the_last_layer(rich):
    patch, tokens = random_patch(2, 3), tokens_of(rich)
    for put in (attach, merge):
        assert same(put(rich, patch).params, put(rich, {2: patch}).params)
        assert same(put(rich, patch).params, put(rich, {-1: patch}).params)
        assert not same(put(rich, patch).params, put(rich, {-2: patch}).params)
    assert relative(attach(rich, patch).apply(tokens), rich.apply(tokens)) > 1e-3


def test_two_names_of_one_layer_are_that_layer(rich):
    first, second = random_patch(2, 3), random_patch(3, 2)
    both = concatenate_layers([{2: first}, {2: second}])
    for put in (attach, merge):
        assert same(put(rich, {2: first, -1: second}).params, put(rich, both).params)


def test_layers_without_neurons_are_left_alone(rich):
    patch = random_patch(2, 3)
    for put in (attach, merge):
        assert same(put(rich, {0: create(16), 1: patch}).params, put(rich, {1: patch}).params)
        assert same(put(rich, {0: create(16)}).params, rich.params)
        assert same(put(rich, {}).params, rich.params)


@pytest.mark.parametrize("layer", LAYERS)
def test_silent_neurons_under_relu_change_no_bit(rich, layer):
    patch = random_patch(4, 2)
    silent, tokens = patch._replace(bias=patch.bias - 1e3), tokens_of(rich)
    np.testing.assert_array_equal(attach(rich, {layer: silent}, relu=True).apply(tokens), rich.apply(tokens))
    # the same neurons awake do change it
    assert relative(attach(rich, {layer: patch}, relu=True).apply(tokens), rich.apply(tokens)) > 1e-3


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("neurons", [0, 3])
def test_empty_and_fresh_patches_change_no_bit(rich, relu, neurons):
    tokens = tokens_of(rich)
    patched = attach(rich, create(16, neurons), relu=relu)
    np.testing.assert_array_equal(patched.apply(tokens), rich.apply(tokens))


def test_unmerging_gives_back_the_parameters_and_the_patches_bit_for_bit(rich):
    patches = random_patches(6, 6, (1, 0, 2))
    merged = merge(rich, patches)
    back, taken = unmerge(merged)
    assert same(back.params, rich.params)
    assert same(taken, patches)
    assert list(taken) == [0, 1, 2]
    assert same(merge(back, taken).params, merged.params)


def test_merges_stack_and_come_out_one_by_one(rich):
    first, second = random_patches(7, 2, (1,)), random_patches(8, 3, (1,))
    once = merge(rich, first)
    twice = merge(once, second)
    assert merged_neurons(rich.config, twice.params) == {1: 5}
    back, taken = unmerge(twice, {1: 3})
    assert same(back.params, once.params)
    assert same(taken, second)
    both = concatenate_layers([first, second])
    assert same(unmerge(twice)[1], both)
    tokens = tokens_of(rich)
    assert relative(twice.apply(tokens), attach(rich, both).apply(tokens)) < 1e-5


def test_detaching_gives_back_the_very_arrays(rich):
    patched = attach(attach(rich, random_patches(1, 2, (0,))), random_patches(2, 2, (2,)), relu=True)
    back = detach(patched)
    assert jax.tree.structure(back.params) == jax.tree.structure(rich.params)
    pairs = zip(jax.tree.leaves(back.params), jax.tree.leaves(rich.params), strict=True)
    assert all(one is other for one, other in pairs)


def test_what_cannot_be_patched_is_an_error(tiny_model, tmp_path):
    with pytest.raises(TPatchError, match="8 wide and the network 16: it was made for another model"):
        attach(tiny_model, random_patch(0, 2, width=8))
    with pytest.raises(TPatchError, match="8 wide and the network 16"):
        merge(tiny_model, random_patch(0, 2, width=8))
    with pytest.raises(TPatchError, match="layer 3 is not in this model; it has layers 0 to 2"):
        attach(tiny_model, random_patches(0, 2, (0, 3)))
    for nothing in ((create(16), "info"), {"2": None}, None):
        with pytest.raises(TPatchError, match="is no patch; give a Patch, or a dict from layers to patches"):
            attach(tiny_model, nothing)
    with pytest.raises(TPatchError, match="nothing is merged into 'tiny'"):
        unmerge(tiny_model)
    merged = merge(tiny_model, random_patches(0, 2, (1,)))
    with pytest.raises(TPatchError, match="layer 1 of 'tiny' holds 2 merged neurons, not 3"):
        unmerge(merged, {1: 3})
    with pytest.raises(TPatchError, match="layer 0 of 'tiny' holds 0 merged neurons, not 1"):
        unmerge(merged, {0: 1})
    with pytest.raises(TPatchError, match="attached to layer 1; merge it before saving"):
        save_model(attach(tiny_model, random_patches(0, 2, (1,))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_are_checked_and_count_from_both_ends(tiny_model):
    assert [tiny_model.layer(layer) for layer in (None, 0, 2, -1, -3)] == [2, 0, 2, 2, 0]
    for layer in (3, -4, 100):
        with pytest.raises(TPatchError, match=f"layer {layer} is not in this model; it has layers 0 to 2"):
            tiny_model.trace(tokens_of(tiny_model), layer)


def test_models_are_equal_after_a_round_trip_of_text(tmp_path):
    model = make_tiny_model(5, tie_word_embeddings=True)
    loaded = load_model(write_tiny_folder(model, tmp_path / "tiny"))
    assert loaded.generate("the cat", 12) == model.generate("the cat", 12)
    assert tiny_tokenizer().decode(loaded.encode("the cat")) == "the cat"


def test_lanes_that_have_ended_are_dropped_and_the_others_go_on(tiny_model, monkeypatch):
    texts = [
        f"{first} {second}"
        for first in ("the cat", "in", "a hen", "who")
        for second in ("sat", "hid", "is", "ran", "in")
    ]
    rows = [tiny_model.encode(text) for text in texts]
    given = tiny_model.config, tiny_model.params, rows, 12
    alone = [generation.greedy(*given[:2], [row], 12)[0] for row in rows]
    # All but three end after a few tokens, each at its own place.
    most = [12 if number in (4, 11, 17) else 1 + number % 4 for number in range(len(rows))]
    sizes = []
    decode = networks.decode
    monkeypatch.setattr(
        networks, "decode", lambda *args, **named: sizes.append(args[3].shape[0]) or decode(*args, **named)
    )
    said = generation.greedy(*given, ended=lambda number, tokens: len(tokens) == most[number])
    assert said == [row[:count] for row, count in zip(alone, most, strict=True)]
    # Twenty prompts in 24 lanes, of which eight are kept where no more go on.
    assert sizes[0] == 24
    assert sizes[-1] == generation.FEW_LANES
    assert sizes == sorted(sizes, reverse=True)
    # What is drawn depends on how many draw together, so those stay.
    sizes.clear()
    generation.sample(*given, jax.random.key(0), ended=lambda number, tokens: len(tokens) == most[number])
    assert {*sizes} == {32}


def test_writing_into_a_cache_gives_what_writing_beside_it_gives(tiny_model):
    config, params = tiny_model.config, tiny_model.params
    tokens = tokens_of(tiny_model)
    positions = jnp.broadcast_to(jnp.arange(32), tokens.shape)
    _, cache = networks.decode(config, params, tokens, positions, networks.empty_cache(config, params, len(tokens), 40))
    more, places = tokens[:, :1], jnp.full((len(tokens), 1), 32)
    hidden, grown = networks.decode(config, params, more, places, cache)
    again, written = networks.decode(config, params, more, places, cache, in_place=True)
    assert same(again, hidden)
    assert same(written, grown)


def test_what_all_prompts_begin_with_is_read_once(tiny_model, monkeypatch):
    beginning = "in the inn the hen hid and the cat sat"
    texts = [f"{beginning}{rest}" for rest in (" in", " there, then", " with a hat", "", " and", " by", " at", " on")]
    rows = [tiny_model.encode(text) for text in texts]
    shared = len(tiny_model.encode(beginning)) - 1  # the shortest keeps a token behind what is shared
    assert shared >= generation.SHARED
    alone = [generation.greedy(tiny_model.config, tiny_model.params, [row], 6)[0] for row in rows]
    read, decode = [], networks.decode
    monkeypatch.setattr(networks, "decode", lambda *args, **named: read.append(args[2].shape) or decode(*args, **named))
    assert generation.greedy(tiny_model.config, tiny_model.params, rows, 6) == alone
    assert read[0][0] == 1
    assert read[1][0] == 8
    assert read[1][1] < len(rows[1])
    # One that begins otherwise, and nothing is shared.
    read.clear()
    generation.greedy(tiny_model.config, tiny_model.params, [*rows[:3], tiny_model.encode("who is in there")], 1)
    assert [shape[0] for shape in read] == [4]
