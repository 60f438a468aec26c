"""Mixtures of experts: what a patch beside them leaves as it is, how their weights lie in files, what is refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, relative, same
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_subject_site import MEMORY, settings
from tiny_families import tiny_model, tiny_settings

import tpatch_jax as tp
from tpatch_jax.benchmarks.network_shapes import network_shape
from tpatch_jax.core.ffn import ACTIVATIONS
from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.locft import LocftSettings, check_locft
from tpatch_jax.editors.rome.rome import RomeSettings, check_rome
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.checkpoints import folder as checkpoint
from tpatch_jax.models.checkpoints.check import check_folder
from tpatch_jax.models.config import Mixture
from tpatch_jax.models.experts import Experts
from tpatch_jax.models.families.registry import configure
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")
FOLDER = Path(__file__).parent / "reference"


# --- the experts themselves ---


def every_expert(experts: Experts, query: jax.Array) -> jax.Array:
    """The same by all experts on all tokens, those that were not chosen times zero."""
    chosen = experts.route(query)
    weight = jnp.zeros((len(query), experts.mixture.experts))
    weight = weight.at[jnp.arange(len(query))[:, None], chosen.expert].set(chosen.weight)
    gate, up, down = (part.kernel[...] for part in (experts.gate, experts.up, experts.down))
    act = ACTIVATIONS[experts.activation]
    hidden = act(jnp.einsum("nd,edf->nef", query, gate)) * jnp.einsum("nd,edf->nef", query, up)
    return jnp.einsum("nef,efd,ne->nd", hidden, down, weight)


@pytest.mark.parametrize(("tokens", "normalised"), [(1, True), (3, False), (70, True)])
def test_each_token_is_computed_by_its_experts(tokens, normalised):
    """One token, fewer than there are experts, and blocks of which some are full; values and gradients."""
    rng = np.random.default_rng(tokens)
    experts = Experts(Mixture(5, 2, 6, normalised), 4, "silu", rngs=nnx.Rngs(0))
    for part in (experts.gate, experts.up, experts.down):
        part.kernel = nnx.Param(jnp.asarray(rng.normal(size=part.kernel.shape), jnp.float32))
    # Half of the tokens go the same way, so that one expert has several blocks.
    query = rng.normal(size=(tokens, 4)).astype(np.float32)
    query[: tokens // 2] = query[0]
    query = jnp.asarray(query)
    assert bool((jnp.sum(experts.route(query).weight, -1) > 0.999).all()) == normalised
    summed = lambda run: jax.value_and_grad(lambda query: (run(query) ** 2).sum())(query)  # noqa: E731
    for ours, wanted in zip(summed(experts), summed(lambda query: every_expert(experts, query)), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=2e-4, atol=2e-4)


def test_experts_are_chosen_in_the_best_groups():
    """Without a correction by the largest score of each group; with one by the two largest, and it is in no weight."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(50, 8)).astype(np.float32)
    for corrected in (False, True):
        mixture = Mixture(8, 2, 6, corrected, groups=4, active_groups=2, corrected=corrected, logistic=corrected)
        experts = Experts(mixture._replace(scale=2.5), 8, "silu", rngs=nnx.Rngs(0))
        correction = rng.normal(size=8).astype(np.float32) if corrected else np.zeros(8, np.float32)
        if corrected:
            experts.correction = nnx.Param(jnp.asarray(correction))
        logits = query @ np.asarray(experts.router.kernel[...])
        scores = np.asarray(jax.nn.sigmoid(logits) if corrected else jax.nn.softmax(logits, -1))
        routes = experts.route(jnp.asarray(query))
        for row, score in enumerate(scores):
            grouped = (score + correction).reshape(4, 2)
            best = np.argsort(-(grouped.sum(-1) if corrected else grouped.max(-1)))[:2]
            allowed = [expert for expert in range(8) if expert // 2 in best]
            chosen = sorted(allowed, key=lambda expert: -(score + correction)[expert])[:2]
            assert routes.expert[row].tolist() == chosen
            weight = score[chosen] / (score[chosen].sum() if corrected else 1)
            np.testing.assert_allclose(routes.weight[row], 2.5 * weight, rtol=1e-5)


# --- what a patch leaves as it is ---


@pytest.fixture(scope="module")
def mixtral(quick_compilation) -> Model:
    return make_tiny_model(defaults=tiny_settings("mixtral", hidden_size=32, head_dim=16))


def test_routing_is_what_it_was_wherever_no_neuron_reaches(mixtral):
    """Of two rows one has a token at which a neuron fires: before it and in the other row nothing changes."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 260, (2, 12)))
    layer, place = 1, 5
    query = np.asarray(mixtral.trace(tokens, layer).query)
    key = query[0, place] / np.linalg.norm(query[0, place])
    strength = np.sort((query @ key).ravel())
    bias = -(strength[-1] + strength[-2]) / 2
    patch = Patch(jnp.asarray(key)[None], jnp.asarray([bias]), jnp.full((1, 32), 50.0, jnp.float32))
    patched = tp.attach(mixtral, {layer: patch}, relu=True)
    before, after = (networks.routes(each.config, each.params, tokens) for each in (mixtral, patched))
    assert sorted(before) == sorted(after) == [0, 1, 2]
    unreached = np.ones((2, 12), bool)
    unreached[0, place:] = False
    # The layer of the patch itself routes all tokens as before; the one behind it notices.
    for number, there in ((0, unreached | True), (1, unreached | True), (2, unreached)):
        assert np.array_equal(before[number].expert[there], after[number].expert[there]), number
        np.testing.assert_allclose(after[number].weight[there], before[number].weight[there], rtol=1e-5)
    assert not np.array_equal(before[2].weight[0, place], after[2].weight[0, place])
    logits = [np.asarray(each.apply(tokens)) for each in (mixtral, patched)]
    np.testing.assert_allclose(logits[1][unreached], logits[0][unreached], atol=1e-5)
    assert relative(logits[1], logits[0]) > 1e-2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "olmoe", "deepseek_v3"])
def test_other_mixtures_route_as_before_too(family):
    """A neuron beside the first mixture fires at one token of two rows: all others go where they went."""
    model = tiny_model(family)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 48, (2, 12)))
    place, layer = 5, min(networks.routes(model.config, model.params, tokens))
    query = np.asarray(model.trace(tokens, layer).query)
    key = query[0, place] / np.linalg.norm(query[0, place])
    strength = np.sort((query @ key).ravel())
    value = jnp.full((1, model.config.hidden_size), 50.0, jnp.float32)
    patch = Patch(jnp.asarray(key)[None], jnp.asarray([-(strength[-1] + strength[-2]) / 2]), value)
    patched = tp.attach(model, {layer: patch}, relu=True)
    before, after = (networks.routes(each.config, each.params, tokens) for each in (model, patched))
    unreached = np.ones((2, 12), bool)
    unreached[0, place:] = False
    assert all(np.array_equal(before[at].expert[unreached], after[at].expert[unreached]) for at in before)
    logits = [np.asarray(each.apply(tokens)) for each in (model, patched)]
    np.testing.assert_allclose(logits[1][unreached], logits[0][unreached], atol=1e-5)
    assert relative(logits[1], logits[0]) > 1e-3


def test_an_edit_at_the_subject_holds(mixtral, tmp_path):
    """Keys and values of a layer in the middle, through packed rows, and the model generates with its cache."""
    (tmp_path / "memory.txt").write_text(MEMORY)
    request = EditRequest("the fox sat in", "ab", subject="fox")
    patches, info = tp.edit(mixtral, [request], settings=settings(), memory=tmp_path / "memory.txt", cache=False)
    assert [(result.held, result.site) for result in info.requests] == [(True, "subject")]
    assert min(patches) < 2
    assert not mixtral.generate(request.prompt, 4).startswith(" ab")
    merged = tp.merge(mixtral, patches)
    assert merged.generate(request.prompt, 4).startswith(" ab")
    assert same(tp.unmerge(merged)[0].params, mixtral.params)


# --- files ---


def fused(name: str, folder: Path) -> Path:
    """A reference's folder with the experts of a layer in two tensors, as transformers has them in memory."""
    folder.mkdir()
    shutil.copyfile(FOLDER / name / "config.json", folder / "config.json")
    config, params, _ = checkpoint.read_folder(FOLDER / name)
    tensors = load_file(FOLDER / name / "model.safetensors")
    kept = {
        key.replace(".block_sparse_moe.", ".mlp."): tensor for key, tensor in tensors.items() if "experts." not in key
    }
    for layer in range(config.layers):
        if config.mixed(layer):
            gate, up, down = (
                np.swapaxes(params["layers"][layer]["experts"][part]["kernel"], 1, 2) for part in ("gate", "up", "down")
            )
            kept[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], 1)
            kept[f"model.layers.{layer}.mlp.experts.down_proj"] = np.ascontiguousarray(down)
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_experts_read_the_same(name, tmp_path):
    config, params, _ = checkpoint.read_folder(FOLDER / name)
    folder = fused(name, tmp_path / "fused")
    assert check_folder(folder)["problems"] == []
    other, read, _ = checkpoint.read_folder(folder)
    assert other == config
    assert same(read, params)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj"]
    save_file(tensors, folder / "model.safetensors")
    assert check_folder(folder)["problems"] == ["model.layers.1.mlp.experts.down_proj is missing"]


def test_experts_of_several_types_lose_nothing(tmp_path):
    shutil.copytree(FOLDER / "mixtral", tmp_path / "model")
    tensors = load_file(FOLDER / "mixtral" / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    kernel = checkpoint.read_folder(tmp_path / "model")[1]["layers"][0]["experts"]["gate"]["kernel"]
    wanted = checkpoint.read_folder(FOLDER / "mixtral")[1]["layers"][0]["experts"]["gate"]["kernel"]
    assert kernel.dtype == np.float32
    assert np.array_equal(kernel[1:], wanted[1:])
    np.testing.assert_allclose(kernel[0], wanted[0], atol=1e-3)


def test_what_is_said_of_experts():
    sizes = check_folder(FOLDER / "qwen3_moe")["sizes"]
    assert [sizes[name] for name in ("ffn_width", "experts", "experts_used", "expert_width")] == [24, 6, 2, 8]
    assert check_folder(FOLDER / "mixtral")["sizes"]["ffn_width"] == 0
    exports = {name: check_folder(FOLDER / name)["export"] for name in ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")}
    assert exports == {
        **dict.fromkeys(("mixtral", "qwen3_moe"), "approximate only"),
        "qwen2_moe": "none",
        "olmoe": "none",
    }


def test_experts_in_mxfp4_are_read(tmp_path):
    """As gpt-oss is published: what it stands for is what transformers makes of it, number by number."""
    settings = tiny_settings(
        "gpt_oss", hidden_size=32, intermediate_size=32, quantization_config={"quant_method": "mxfp4"}
    )
    plain = make_tiny_model(defaults={name: entry for name, entry in settings.items() if name != "quantization_config"})
    tp.save_model(plain, tmp_path / "plain")
    tensors, rng = load_file(tmp_path / "plain" / "model.safetensors"), np.random.default_rng(0)
    wanted = {}
    table = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = tensors.pop(name).shape
        halves = rng.integers(0, 16, (experts, outer, inner)).astype(np.uint8)
        scales = rng.integers(120, 126, (experts, outer, inner // 32)).astype(np.uint8)
        pairs = halves.reshape(experts, outer, inner // 32, 16, 2)
        tensors |= {f"{name}_blocks": pairs[..., 0] | pairs[..., 1] << 4, f"{name}_scales": scales}
        wanted[name] = np.swapaxes(table[halves] * 2.0 ** (np.repeat(scales, 32, -1).astype(np.float32) - 127), 1, 2)
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    assert check_folder(folder)["problems"] == []
    assert check_folder(folder)["weights"]["types"]["MXFP4"] == 6
    _, params, read = checkpoint.read_folder(folder, "float32")
    assert "quantization_config" not in read
    experts = params["layers"][1]["experts"]
    both = wanted["model.layers.1.mlp.experts.gate_up_proj"]
    assert np.array_equal(experts["gate"]["kernel"], both[..., ::2])
    assert np.array_equal(experts["up"]["kernel"], both[..., 1::2])
    assert np.array_equal(experts["down"]["kernel"], wanted["model.layers.1.mlp.experts.down_proj"])
    # In another family nobody would know how they lie.
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "mixtral"}))
    with pytest.raises(TPatchError, match=r"is quantised \(mxfp4\)"):
        checkpoint.read_folder(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(tensors, folder / "model.safetensors")
    assert check_folder(folder)["problems"][0] == "model.layers.0.mlp.experts.down_proj is missing"


def test_patches_join_the_experts_that_are_for_every_token(tmp_path):
    """A DeepSeek's file stays one whose shared experts are wider; layers that say tokens after the next are no part."""
    _, params, settings = checkpoint.read_folder(FOLDER / "deepseek_v3")
    model = Model(configure(settings), params, None, "tiny", None, settings)
    assert [model.config.width(layer) for layer in range(3)] == [24, 8, 8]
    patch = Patch(jnp.ones((3, 16)), jnp.ones(3), jnp.ones((3, 16)))
    merged = tp.merge(model, {2: patch})
    tp.save_model(merged, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    place = "model.layers.{}.mlp.shared_experts.gate_proj.{}"
    assert [tensors[place.format(layer, "weight")].shape[0] for layer in (1, 2)] == [8, 11]
    assert place.format(2, "bias") in tensors
    assert place.format(1, "bias") not in tensors
    save_file(tensors | {"model.layers.3.eh_proj.weight": np.ones(2, np.float32)}, tmp_path / "out/model.safetensors")
    assert same(checkpoint.read_folder(tmp_path / "out")[1], merged.params)
    assert check_folder(tmp_path / "out")["weights"]["left_out"] == ["model.layers.3.eh_proj.weight"]
    assert check_folder(FOLDER / "deepseek_v2")["export"] == "exact"
    assert check_folder(FOLDER / "deepseek_v3")["sizes"]["shared_expert_width"] == 8


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mixtral", {"num_experts": 8}, "4 'num_local_experts' and 8 'num_experts'"),
        ("mixtral", {"num_experts_per_tok": 5}, "has 4 experts and 'num_experts_per_tok' 5"),
        ("olmoe", {"num_experts_per_tok": 0}, "'num_experts_per_tok' 0"),
        ("olmoe", {"sliding_window": 8}, "asks for 'sliding_window', which an OLMoE does not have"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "leaves no layer to the experts"),
        ("qwen2_moe", {"decoder_sparse_step": 5}, "leaves no layer to the experts"),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}, "no 'shared_expert_intermediate_size'"),
        ("gpt_oss", {"swiglu_limit": None}, "no 'swiglu_limit'"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "only experts with a limit are supported"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "layers of type 'chunked_attention'"),
        ("qwen3_moe", {"hidden_act": "xielu"}, "activation 'xielu'"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "has 'topk_method' 'noaux_tc'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "which transformers does not follow"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "has 'moe_layer_freq' 2"),
        ("deepseek_v2", {"first_k_dense_replace": 3}, "leaves no layer to the experts"),
        ("deepseek_v3", {"n_shared_experts": None}, "no 'n_shared_experts'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "'scoring_func' 'softmax'"),
        ("deepseek_v3", {"n_group": 3}, "4 experts in 'n_group' 3"),
        ("deepseek_v3", {"num_experts_per_tok": 3}, "2 experts to choose from and 'num_experts_per_tok' 3"),
    ],
)
def test_settings_that_cannot_be_expressed(name, changes, words):
    with pytest.raises(TPatchError, match=words):
        configure(tiny_settings(name, **changes))


def test_settings_of_windows_and_bounds():
    window = {"sliding_window": 8, "use_sliding_window": True}
    assert configure(tiny_settings("qwen3_moe", **window)).windows == (8, 8, 8)
    assert configure(tiny_settings("qwen3_moe", **window | {"use_sliding_window": False})).windows == ()
    assert configure(tiny_settings("mixtral", sliding_window=8)).windows == (8, 8, 8)
    assert configure(tiny_settings("olmoe", clip_qkv=2.0)).attention_clip == 2.0
    assert configure(tiny_settings("qwen2_moe", qkv_bias=False)).query_bias is False


def test_methods_that_need_one_down_projection_say_so(mixtral):
    for check in (lambda: check_rome(mixtral, RomeSettings()), lambda: check_locft(mixtral, LocftSettings())):
        with pytest.raises(TPatchError, match="is a mixture of experts, which has no one down projection"):
            check()
    dense = make_tiny_model(defaults=tiny_settings("qwen3_moe", mlp_only_layers=[1], intermediate_size=24))
    with pytest.raises(TPatchError, match="take one of the layers without experts, 1, or use method tpatcher"):
        check_locft(dense, LocftSettings(layer="2"))
    assert check_locft(dense, LocftSettings(layer="1")) == 1
    with pytest.raises(TPatchError, match="mixture of experts, whose kernels are not kept in INT8"):
        tp.quantize_base(mixtral)
    with pytest.raises(TPatchError, match="is a mixture of experts, for which no plan is made"):
        network_shape(str(FOLDER / "olmoe"))


def test_a_written_model_says_its_experts(mixtral, tmp_path):
    tp.save_model(mixtral, tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.2.block_sparse_moe.experts.3.w2.weight" in names
    assert not any(".ffn" in name or name.endswith("mlp.gate_proj.weight") for name in names)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 4
