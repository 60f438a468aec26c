# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Patches in your own Flax code
#
# A patch needs a query and the rest of the network, not one of this library's models. Here are a small NNX network
# and a small Linen network of our own, `vmap` over edits, and a mesh.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import tpatch_jax as tp
from tpatch_jax.core.fit import FitProblem, FitSettings, fit
from tpatch_jax.core.memory import create_memory

VOCABULARY, WIDTH = 64, 32


# %% [markdown]
# ## NNX


# %%
class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.fc2 = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.gelu(self.fc1(x)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.norm, self.mlp = nnx.LayerNorm(WIDTH, rngs=rngs), Mlp(rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.mlp(self.norm(x))


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.norm = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x, mask = self.embed(tokens), nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


module = Decoder(nnx.Rngs(0))
network = tp.from_nnx(module, "blocks.1.mlp", activation="gelu_tanh", up="fc1", down="fc2")
memory = np.random.default_rng(0).integers(0, VOCABULARY, (16, 16)).tolist()
prompts, targets = [[5, 17, 3], [8, 2, 9]], [[42], [11]]
patch, info = tp.edit_tokens(network, prompts, targets, memory)
print([request.status for request in info.requests])

# %%
wider = network.merge(patch)  # an nnx.Module of your own class
print(wider.blocks[1].mlp.fc1.out_features - module.blocks[1].mlp.fc1.out_features, "neurons wider")
tokens = jnp.asarray(prompts)
print("before", module(tokens)[:, -1].argmax(-1), "after", wider(tokens)[:, -1].argmax(-1), "wanted", targets)


# %% [markdown]
# ## Linen
#
# A Linen module is a description; say how it is called, and how it gets wider.


# %%
class LinenMlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(self.hidden)(x))
        return nn.Dense(WIDTH)(x)


class LinenDecoder(nn.Module):
    hidden: int = 4 * WIDTH

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
        x = x + LinenMlp(self.hidden, name="mlp")(nn.LayerNorm()(x))
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))


linen = LinenDecoder()
params = linen.init(jax.random.key(0), jnp.asarray(prompts))["params"]
cut = tp.from_linen(
    linen, params, "mlp", activation="gelu_tanh", widen=lambda module, n: module.clone(hidden=module.hidden + n)
)
linen_patch, info = tp.edit_tokens(cut, prompts, targets, memory)
wider_linen, wider_params = cut.merge(linen_patch)
logits = wider_linen.apply({"params": wider_params}, jnp.asarray(prompts))
print([request.status for request in info.requests], logits[:, -1].argmax(-1), "wanted", targets)

# %% [markdown]
# ## vmap over edits
#
# One fit is a pure function of arrays: a lane (its queries, target, and where its value starts), the memory, and the
# rest of the network. Many fits are its `vmap`.

# %%
COUNT = 8
keys = jax.random.split(jax.random.key(1), 3)
head = jax.random.normal(keys[0], (WIDTH, VOCABULARY)) / WIDTH**0.5
queries = jax.random.normal(keys[1], (COUNT, 1, WIDTH))
rows = create_memory(jax.random.normal(keys[2], (128, WIDTH)))
wanted = jnp.arange(COUNT)
nothing = jnp.zeros((COUNT, 0, WIDTH))
lanes = FitProblem(queries, 0 * queries, nothing, None, wanted, head.T[wanted], jnp.ones(COUNT))


@jax.jit
def fit_all(lanes, keys):
    def one(lane, key):
        return fit(lane, rows, lambda context, output: output @ head, key, FitSettings(), jax.nn.relu)

    return jax.vmap(one)(lanes, keys)


patches, fitted = fit_all(lanes, jax.random.split(jax.random.key(2), COUNT))
print("keys", patches.key.shape, "held", fitted.held.sum(), "of", COUNT)

# %% [markdown]
# ## A mesh
#
# Lanes are a leading axis like any other. Each device fits its share; the results are the same.

# %%
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
spread = jax.device_put(lanes, NamedSharding(mesh, PartitionSpec("data")))
sharded, _ = fit_all(spread, jax.random.split(jax.random.key(2), COUNT))
print(mesh, "largest difference", jnp.abs(sharded.key - patches.key).max())
