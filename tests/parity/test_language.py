"""Language models equal transformers' `Qwen2ForCausalLM`, `Qwen3ForCausalLM` and `LlamaForCausalLM`."""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity.helpers import assert_bfloat16, assert_close, difference, imported, numpy, randomise, torch
from ross_jax.inference.generate import Decoding, Prompts, generate
from ross_jax.models.language import LanguageModel, empty_cache, rotary_frequencies, rotate
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import RossConfig

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

VOCAB = 97
FAR = 100_000
FAR_POSITIONS = 5e-3
"""Tolerance at positions of 1e5, where float32 rounds angles by 4e-3 radians. Frequencies differ too, because
torch computes the power in float32 and we in float64."""
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "qwen2": ("Qwen2", {"rope_theta": 1e6}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
    "qwen3": ("Qwen3", {"head_dim": 20, "rope_theta": 1e6}),
    "qwen3_bias_tied": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "llama_mha": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama_gqa_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_theta": 5e5}),
    "llama_head_dim": ("Llama", {"head_dim": 18, "num_hidden_layers": 1}),
    "llama_linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama_llama3": ("Llama", {"rope_scaling": LLAMA3, "head_dim": 32}),
}


def build(name: str):
    family, changes = copy.deepcopy(MODELS[name])  # transformers changes its arguments
    changes = {"tie_word_embeddings": False, "rope_theta": 10000.0, **changes}
    config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
    return randomise(getattr(transformers, f"{family}ForCausalLM")(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Function: name -> (torch module, folder that it was saved to)."""

    @functools.cache
    def save(name: str):
        folder, module = tmp_path_factory.mktemp(name), build(name)
        module.generation_config = transformers.GenerationConfig()
        module.save_pretrained(folder)
        return module, folder

    return save


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(config, dtype, params, tokens, positions, segments):
    model, tree = LanguageModel(config, dtype), {"params": params}
    embeddings = model.apply(tree, tokens, method="embed")
    output = model.apply(tree, embeddings, positions, segments, hidden_states=True)
    return output.hidden_states, model.apply(tree, output.hidden, method="logits")


def run(config, params, tokens, positions, segments, dtype=jnp.float32):
    """Hidden states of all layers, and logits."""
    return forward(config, dtype, params, *(jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments)))


def run_torch(module, tokens, positions, mask=None):
    with torch.no_grad():
        output = module(
            input_ids=torch.as_tensor(tokens),
            attention_mask=None if mask is None else torch.as_tensor(mask),
            position_ids=torch.as_tensor(positions),
            output_hidden_states=True,
            use_cache=False,
        )
    return np.stack([numpy(state) for state in output.hidden_states]), numpy(output.logits)


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, shape)


def padded(lengths: list[int], left: bool):
    """Tokens, mask and positions of random prompts of the given lengths."""
    length = max(lengths)
    tokens = random_tokens(len(lengths), length)
    index, count = np.arange(length), np.array(lengths)[:, None]
    mask = index >= length - count if left else index < count
    return tokens * mask, mask.astype(np.int64), np.maximum(np.cumsum(mask, 1) - 1, 0)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_logits(saved, name, left):
    module, folder = saved(name)
    config, params = imported(folder)
    tokens, mask, positions = padded([3, 12, 7], left)
    theirs = run_torch(module, tokens, positions, mask)
    for ours, expected in zip(run(config, params, tokens, positions, mask), theirs, strict=True):
        assert ours.shape == expected.shape
        valid = np.broadcast_to(mask.astype(bool), ours.shape[:-1])
        assert_close(np.asarray(ours)[valid], expected[valid])


@pytest.mark.parametrize("name", ["qwen2", "llama_mha", "llama_llama3"])
def test_packed_conversations(saved, name):
    """Each conversation of a packed row equals torch's forward pass on that conversation alone."""
    module, folder = saved(name)
    config, params = imported(folder)
    lengths = [[5, 1, 8], [9, 4]]
    tokens = random_tokens(2, 16)
    segments, positions = np.zeros((2, 16), int), np.zeros((2, 16), int)
    places = []
    for row, sizes in enumerate(lengths):
        ends = np.cumsum(sizes)
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True), start=1):
            places.append((row, slice(end - size, end)))
            segments[places[-1]], positions[places[-1]] = number, np.arange(size)
    ours = run(config, params, tokens, positions, segments)
    for place in places:
        theirs = run_torch(module, tokens[place][None], positions[place][None])
        assert_close(ours[0][:, *place], theirs[0][:, 0])
        assert_close(ours[1][place], theirs[1][0])


@pytest.mark.parametrize("name", ["llama_linear", "llama_llama3"])
def test_rope_scaling(saved, name):
    """RoPE scaling equals transformers' beyond the original context, and changes the logits."""
    module, folder = saved(name)
    config, params = imported(folder)
    tokens, positions = random_tokens(2, 300), np.tile(np.arange(300), (2, 1))
    theirs = run_torch(module, tokens, positions)[1]
    assert_close(run(config, params, tokens, positions, np.ones_like(tokens))[1], theirs)
    plain = dataclasses.replace(config, rope_scaling=None)
    without = run(plain, params, tokens, positions, np.ones_like(tokens))[1]
    assert difference(without, theirs) > 0.1


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4.0}, LLAMA3])
def test_old_config(scaling, tmp_path):
    """A config.json with `rope_theta` and `rope_scaling`, as published, means the same as `rope_parameters`."""
    kwargs = {**TINY, "rope_theta": 5e5, "rope_scaling": scaling and dict(scaling)}
    module = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**kwargs)))
    module.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings.pop("rope_parameters")["rope_theta"] == 5e5
    settings |= {"rope_theta": 5e5, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config, params = imported(tmp_path)
    tokens, positions = random_tokens(1, 100), np.arange(100)[None]
    ours = run(config, params, tokens, positions, np.ones_like(tokens))[1]
    assert_close(ours, run_torch(module, tokens, positions)[1])


@pytest.mark.parametrize("name", ["qwen2", "llama_mha", "llama_llama3"])
def test_far_positions(saved, name):
    module, folder = saved(name)
    config, params = imported(folder)
    tokens, mask, positions = padded([16, 16], left=False)
    positions = positions * 7 + FAR
    ours = run(config, params, tokens, positions, mask)[1]
    assert_close(ours, run_torch(module, tokens, positions, mask)[1], FAR_POSITIONS)
    np.testing.assert_allclose(rotary_frequencies(config), numpy(module.model.rotary_emb.inv_freq), rtol=1e-6)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama_mha", "llama_llama3"])
def test_decoding_with_a_cache(saved, name):
    """Reading a padded batch in pieces equals one forward pass, ours and torch's."""
    module, folder = saved(name)
    config, params = imported(folder)
    tokens, mask, positions = padded([6, 12, 9], left=False)
    model, tree = LanguageModel(config), {"params": params}

    @jax.jit
    def read(cache, tokens, positions, segments):
        embeddings = model.apply(tree, tokens, method="embed")
        return model.apply(tree, embeddings, positions, segments, cache)

    cache, pieces = empty_cache(config, 3, 15), []
    for piece in (slice(0, 5), slice(5, 9), slice(9, 10), slice(10, 11), slice(11, 12)):
        batch = (jnp.asarray(x[:, piece], jnp.int32) for x in (tokens, positions, mask))
        output = read(cache, *batch)
        cache = output.cache
        pieces.append(output.hidden)
    hidden = np.concatenate(pieces, axis=1)
    valid = mask.astype(bool)
    assert cache.lengths.tolist() == [6, 12, 9]
    assert_close(hidden[valid], np.asarray(run(config, params, tokens, positions, mask)[0][-1])[valid])
    assert_close(hidden[valid], run_torch(module, tokens, positions, mask)[0][-1][valid])


@pytest.mark.parametrize("name", ["qwen2", "llama_gqa_biases"])
def test_bfloat16(saved, name, tmp_path):
    """With bfloat16 weights, float32 results equal torch's, and bfloat16 results are as close to float32 as torch's."""
    module, _ = saved(name)
    copy.deepcopy(module).bfloat16().save_pretrained(tmp_path)
    config, params = imported(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    tokens, mask, positions = padded([16] * 16, left=False)
    # Loaded rather than cast, because a cast would also round the rotary frequencies.
    rounded, exact = (
        run_torch(type(module).from_pretrained(tmp_path, dtype=dtype), tokens, positions)
        for dtype in (torch.bfloat16, torch.float32)
    )
    for ours, theirs in zip(run(config, params, tokens, positions, mask), exact, strict=True):
        assert_close(ours, theirs)
    found = run(config, params, tokens, positions, mask, jnp.bfloat16)
    for ours, *others in zip(found, rounded, exact, strict=True):
        assert_bfloat16(ours, *others)
    # Logits are computed in float32, not converted to it at the end.
    assert (found[0].dtype, found[1].dtype) == (jnp.bfloat16, jnp.float32)
    assert (found[1] != found[1].astype(jnp.bfloat16)).mean() > 0.9


def test_rotation_of_bfloat16_is_float32_inside():
    """Rotation of bfloat16 arrays is computed in float32; only the result is rounded."""
    x = jax.random.normal(jax.random.key(0), (2, 50, 3, 8), jnp.bfloat16)
    angles = jax.random.uniform(jax.random.key(1), (2, 50, 4), maxval=300.0)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    found, exact = rotate(x, cos, sin), rotate(x.astype(jnp.float32), cos, sin)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=2**-8)


GRID = 3


@pytest.fixture(scope="module")
def speaker(saved, tmp_path_factory):
    """Config and parameters of vision encoder, projector and language model; the torch model, and its `embed`."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = transformers.SiglipVisionConfig(**sizes, image_size=14 * GRID, patch_size=14)
    tower = randomise(transformers.SiglipVisionModel(tower))
    folder = tmp_path_factory.mktemp("tower")
    tower.save_pretrained(folder)
    vision, vision_params = imported(folder)
    module, folder = saved("qwen2")
    language, language_params = imported(folder)
    projector = randomise(torch.nn.Linear(32, TINY["hidden_size"]))
    linear = {"kernel": jnp.asarray(numpy(projector.weight).T), "bias": jnp.asarray(numpy(projector.bias))}
    config = RossConfig(vision, ProjectorConfig("mlp", 32, TINY["hidden_size"], 1), language)
    params = {"vision": vision_params, "projector": {"linear_0": linear}, "language": language_params}

    def embed(tokens, mask, images, starts):
        """torch's embeddings of the tokens, with each image's projected features at its place."""
        with torch.no_grad():
            embeddings = module.model.embed_tokens(torch.as_tensor(tokens))
            for row, slots in enumerate(starts):
                for slot, start in enumerate(slots):
                    if start < tokens.shape[1]:
                        image = torch.tensor(images[row, slot]).movedim(-1, 0)[None]
                        states = tower(image, output_hidden_states=True).hidden_states
                        embeddings[row, start : start + GRID**2] = projector(states[-2])[0]
        return embeddings

    return config, params, module, embed


@pytest.mark.parametrize("image_count", [0, 2])
@pytest.mark.parametrize("stops", [False, True])
def test_greedy_generation(speaker, image_count, stops):
    """Tokens and logits equal transformers' for padded prompts with no, one or two images."""
    config, params, module, embed = speaker
    new = 12
    tokens, mask, _ = padded([22, 25, 14, 5], left=True)
    images = np.random.default_rng(3).normal(size=(4, image_count, 14 * GRID, 14 * GRID, 3)).astype(np.float32)
    starts = np.array([[4, 14], [25, 16], [12, 25], [25, 25]])[:, :image_count]
    embeddings = embed(tokens, mask, images, starts)
    attended = torch.as_tensor(mask)

    def theirs(stop):
        with torch.no_grad():
            return module.generate(
                inputs_embeds=embeddings,
                attention_mask=attended,
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )

    free = theirs(None).sequences.numpy()
    assert len({tuple(row) for row in free}) == 4
    # The second row stops at its sixth id, other rows at the same id or at the limit.
    stop = int(free[1, 5]) if stops else None
    expected = theirs(stop)
    ids = expected.sequences.numpy()
    lengths = mask.sum(1)
    padding = tokens.shape[1] - lengths  # theirs stands before a prompt, ours behind it
    prompts = Prompts(
        jnp.asarray([np.roll(row, -shift) for row, shift in zip(tokens, padding, strict=True)], jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(images),
        jnp.asarray(np.where(starts < tokens.shape[1], starts - padding[:, None], starts), jnp.int32),
    )
    decoding = Decoding(config, stops=() if stop is None else (stop,))
    ours = jax.jit(generate, static_argnums=(0, 3, 4))(decoding, params, prompts, new, True)
    stopped = [list(row).index(stop) + 1 if stop in row else new for row in ids]
    assert list(ours.lengths) == stopped
    assert ours.tokens.shape == (4, new)
    logits = torch.stack(expected.logits, 1)
    for row, length in enumerate(stopped):
        assert list(ours.tokens[row, :length]) == list(ids[row, :length])
        assert (ours.tokens[row, length:] == ours.tokens[row, length - 1]).all()
        assert_close(ours.logits[row, :length], numpy(logits[row, :length]))
    assert not stops or min(stopped) < max(stopped)
