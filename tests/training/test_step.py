"""The training step: losses and updates do not depend on devices, micro-batches or packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax.models.denoiser import Denoiser
from ross_jax.objectives.loss import make_loss
from ross_jax.objectives.reconstruction import ReconstructionConfig
from ross_jax.sharding import MeshConfig, make_mesh
from ross_jax.training.state import FreezeConfig, abstract_tree, init_components
from ross_jax.tree import flatten, merge
from tiny import CONFIG, MODELS, STAGE2, Run, make_batch


def slow(*values):
    """Parameters of a test that run only with the slow tests."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


MESHES = [(2, 2, 2)]
MESHES += slow((1, 8, 1), (8, 1, 1), (1, 2, 4), (2, 4, 1), (4, 2, 1), (1, 4, 2), (4, 1, 2), (2, 1, 4), (1, 1, 8))


@pytest.fixture(scope="module")
def single():
    """Metrics of two steps on one device, the parameters after the steps, and the parameters before them."""
    run = Run()
    before = {path: np.asarray(leaf) for path, leaf in flatten(run.state.params).items()}
    metrics = [run.run(make_batch(seed=seed)) for seed in (0, 1)]
    return metrics, {path: np.asarray(leaf) for path, leaf in flatten(run.state.params).items()}, before


def agrees(run: Run, single, rtol: float = 2e-5):
    """Checks that two steps of `run` give the losses, gradient norms and parameters of one device."""
    metrics, params, before = single
    for seed, expected in enumerate(metrics):
        found = run.run(make_batch(seed=seed))
        for name, value in expected.items():
            # Gradients accumulate more rounding errors than losses.
            tolerance = 5 * rtol if name == "gradient_norm" else rtol
            assert found[name] == pytest.approx(value, rel=tolerance, abs=1e-7), (seed, name)
    for path, leaf in flatten(run.state.params).items():
        moved = np.abs(params[path] - before[path]).max()
        # The first Adam steps have the size of the learning rate whatever the gradient, so that is the scale.
        np.testing.assert_allclose(np.asarray(leaf), params[path], atol=0.05 * max(moved, 1e-6), err_msg=path)


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_every_mesh_gives_the_losses_of_one_device(sizes, single):
    run = Run(MeshConfig(*sizes), devices=8)
    agrees(run, single)
    kernel = run.state.params["language"]["layers"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.nbytes * sizes[1] * sizes[2] == kernel.nbytes
    moments = run.state.opt_state[1].inner_states["rest"].inner_state[0].mu["language"]["layers"]["gate"]["kernel"]
    assert moments.sharding == kernel.sharding


def test_parameters_begin_the_same_on_a_mesh_as_on_one_device():
    tree = abstract_tree(CONFIG, STAGE2, make_mesh(MeshConfig(2, 2, 2)))
    found, run = flatten(init_components(CONFIG, tree, tree, jax.random.key(0))), Run()
    for path, leaf in flatten(merge(run.state.params, run.state.frozen)).items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(leaf), err_msg=path)


@pytest.mark.parametrize("name", ["latent", *slow("pixel", "latent of a teacher", "latent2pixel")])
def test_every_kind_learns_on_a_mesh_as_on_one_device(name):
    """Losses and gradient norms on a mesh are those of one device, where the loss falls."""
    options = {"config": MODELS[name], "reconstruction": ReconstructionConfig(name.split()[0])}
    one, mesh = Run(**options), Run(MeshConfig(2, 2, 2), devices=8, **options)
    losses = []
    for seed in (0, 1, 2):  # warm-up makes the first update zero, so the third losses show an update
        expected, found = one.run(make_batch(seed=seed)), mesh.run(make_batch(seed=seed))
        for field in ("text_loss", "reconstruction_loss", "gradient_norm"):
            assert found[field] == pytest.approx(expected[field], rel=1e-4), (seed, field)
        losses.append(expected["reconstruction_loss"])
    assert losses[0] > 0
    assert "regressor" in one.state.params
    before = losses[0]
    still = Run(**options, learning_rate=0.0).run(make_batch(seed=0))["reconstruction_loss"]
    assert still == pytest.approx(before, rel=1e-6)
    for _ in range(3):
        again = one.run(make_batch(seed=0))["reconstruction_loss"]
    assert again < before


@pytest.mark.parametrize("parts", [2, *slow(4)])
def test_accumulation_changes_nothing(parts, single):
    agrees(Run(accumulate=parts), single)
    agrees(Run(MeshConfig(1, 2, 1), devices=2, accumulate=parts), single)


@pytest.mark.parametrize("remat", ["full", "gate", *slow("attention", "mlp", "offload", "dots")])
def test_rematerialisation_changes_nothing(remat, single):
    agrees(Run(remat=remat), single)


@pytest.mark.parametrize("places", [24, *slow(14)])
def test_logits_of_supervised_positions_alone_change_nothing(places, single):
    """Capacity for the fullest row, or for all positions, gives the same step as computing all logits."""
    assert max((make_batch(seed=seed)["targets"] != -100).sum(1).max() for seed in (0, 1)) <= places
    agrees(Run(supervised=places), single)
    agrees(Run(MeshConfig(2, 2, 2), devices=8, supervised=places), single)


def test_packing_changes_nothing():
    """Two conversations in a row have the losses and gradient norm of the same conversations in rows of their own."""
    packed = make_batch(rows=3)
    apart = make_batch(rows=6)
    for row in range(3):
        for half in range(2):
            here, there = slice(10 * half, 10 * half + 10), 2 * row + half
            for name, empty in {"tokens": 0, "targets": -100, "positions": 0, "segments": 0}.items():
                apart[name][there] = empty
                apart[name][there, :10] = packed[name][row, here]
            apart["segments"][there, :10] = 1
            apart["image_start"][there], apart["image_ids"][there] = 24, 0
            if packed["image_start"][row, half] < 24:
                apart["image_start"][there, 0] = packed["image_start"][row, half] - 10 * half
                apart["image_ids"][there, 0] = packed["image_ids"][row, half]
                apart["images"][there, 0] = packed["images"][row, half]
    one, two = Run().run(packed), Run().run(apart)
    assert one["images"] == 3
    for name in ("text_loss", "reconstruction_loss", "gradient_norm", "supervised_tokens", "images"):
        assert two[name] == pytest.approx(one[name], rel=2e-5), name


def test_rows_without_image_slots():
    """Rows without image slots equal rows whose slots are all empty, and the text loss falls."""
    freeze, options = FreezeConfig((r"language/.*",)), {"reconstruction": ReconstructionConfig("none")}
    options |= {"config": MODELS["none"], "freeze": freeze, "learning_rate": 1e-2}
    empty = make_batch()
    empty["image_start"][:], empty["image_ids"][:] = empty["tokens"].shape[1], 0
    none = empty | {name: empty[name][:, :0] for name in ("images", "image_start", "image_ids")}
    expected, run = Run(**options).run(empty), Run(MeshConfig(2, 2, 2), devices=8, **options)
    losses = [run.run(none) for _ in range(3)]
    for name in ("text_loss", "gradient_norm"):
        assert losses[0][name] == pytest.approx(expected[name], rel=1e-4), name
    assert losses[2]["text_loss"] < losses[0]["text_loss"]  # the first step has learning rate zero


def test_compiles_once():
    run = Run(MeshConfig(2, 2, 2), devices=8)
    for seed in range(3):
        run.run(make_batch(seed=seed))
    assert run.step._cache_size() == 1


def test_frozen_parameters_stay_and_have_no_optimizer_state():
    freeze = FreezeConfig((r"projector/.*", r"denoiser/.*"), dtype="bfloat16", autoencoder_dtype="float32")
    run = Run(freeze=freeze)
    before = jax.tree.map(np.asarray, run.state.frozen)
    run.run(make_batch())
    run.run(make_batch(seed=1))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, run.state.frozen))
    assert set(run.state.params) == {"projector", "denoiser"}
    assert "position_embedding" in run.state.frozen["denoiser"]
    assert str(run.state.frozen["language"]["embedding"].dtype) == "bfloat16"
    trained = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(run.state.opt_state)) < 2 * trained + 100


def test_empty_slots_and_padding_do_not_matter():
    batch, other = make_batch(), make_batch()
    empty = other["image_start"] >= 24
    other["images"][empty] = 255
    other["tokens"][other["segments"] == 0] = 7
    one, two = Run().run(batch), Run().run(other)
    assert one == two


def test_no_images_no_reconstruction():
    batch = make_batch()
    batch["image_start"][:] = 24
    metrics = Run().run(batch)
    assert metrics["reconstruction_loss"] == 0 and np.isfinite(metrics["gradient_norm"])
    single = batch | {name: batch[name][:, :1] for name in ("images", "image_start", "image_ids")}
    official = Run(reconstruction=ReconstructionConfig(compat="official")).run(single)
    assert official["reconstruction_loss"] == 0 and np.isfinite(official["gradient_norm"])


def test_baseline_has_only_the_text_loss():
    baseline = Run(reconstruction=ReconstructionConfig(kind="none"), freeze=STAGE2).run(make_batch())
    ross = Run().run(make_batch())
    assert baseline["loss"] == baseline["text_loss"] == pytest.approx(ross["text_loss"], rel=1e-6)
    assert ross["loss"] == pytest.approx(ross["text_loss"] + ross["reconstruction_loss"], rel=1e-6)


def test_losses_fall():
    run = Run(learning_rate=3e-3)
    first, *_, last = [run.run(make_batch()) for _ in range(8)]
    assert last["text_loss"] < 0.9 * first["text_loss"]


@pytest.mark.slow
def test_text_loss_counts_by_its_weight():
    """The weight scales the text loss in the sum; weight 0 removes it and keeps the reconstruction loss."""
    whole, half, none = (Run(text_weight=weight).run(make_batch()) for weight in (1.0, 0.5, 0.0))
    assert half["text_loss"] == pytest.approx(whole["text_loss"], rel=1e-6)
    assert half["loss"] == pytest.approx(0.5 * whole["text_loss"] + whole["reconstruction_loss"], rel=1e-6)
    assert none["loss"] == none["reconstruction_loss"] == pytest.approx(whole["reconstruction_loss"], rel=1e-6)
    assert set(whole) - set(none) == {"text_loss", "supervised_tokens"}


@pytest.mark.slow
def test_without_text_loss_targets_do_not_matter():
    freeze = FreezeConfig((r"denoiser/.*",), dtype="float32", autoencoder_dtype="float32")
    bare = make_batch()
    bare["targets"][:] = -100
    one = Run(text_weight=0.0, freeze=freeze).run(make_batch())
    assert one == Run(text_weight=0.0, freeze=freeze).run(bare)
    assert one["gradient_norm"] > 0
    split = Run(MeshConfig(2, 2, 2), devices=8, accumulate=2, text_weight=0.0, freeze=freeze).run(bare)
    for name, value in one.items():
        assert split[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_what_configs_say_reaches_the_denoiser(remat):
    """The denoiser gets its own dtype and `remat`, whatever those of the language model are."""
    loss = make_loss(CONFIG, ReconstructionConfig(dtype="bfloat16", remat=remat), remat="gate")
    assert loss.objective.denoiser == Denoiser(CONFIG.denoiser, jnp.dtype("bfloat16"), remat)


def test_text_alone_leaves_the_autoencoder_alone():
    """A batch without images does not run the autoencoder, whose NaN parameters would reach the loss."""
    run, batch = Run(), make_batch()
    run.state.frozen["autoencoder"] = jax.tree.map(lambda x: x * jnp.nan, run.state.frozen["autoencoder"])
    batch["image_start"][:], batch["image_ids"][:] = batch["tokens"].shape[1], 0
    metrics = run.run(batch)
    assert metrics["reconstruction_loss"] == 0.0 and np.isfinite(metrics["gradient_norm"])
    batch = make_batch()
    assert np.isnan(run.run(batch)["reconstruction_loss"])


@pytest.mark.gpu
def test_a_gpu_gives_the_losses_of_a_cpu(gpu):
    """Losses and gradient norms of three float32 steps on a GPU equal those on the CPU."""
    with jax.default_matmul_precision("highest"):
        there, here = (Run(platform=platform, remat="attention") for platform in ("gpu", "cpu"))
        for seed in (0, 1, 2):
            expected, found = here.run(make_batch(seed=seed)), there.run(make_batch(seed=seed))
            for name in ("text_loss", "reconstruction_loss", "gradient_norm"):
                assert found[name] == pytest.approx(expected[name], rel=1e-4), (seed, name)


@pytest.mark.gpu
def test_half_precision_on_a_gpu(gpu):
    """Losses in bfloat16 on a GPU, with cuDNN's attention, are close to those in float32 on the CPU."""
    options = {"dtype": "bfloat16", "reconstruction": ReconstructionConfig(dtype="bfloat16")}
    found = Run(platform="gpu", **options).run(make_batch())
    expected = Run(platform="cpu").run(make_batch())
    for name in ("text_loss", "reconstruction_loss"):
        assert found[name] == pytest.approx(expected[name], rel=0.02), name
