"""Adapters of peft: theirs become our updates, ours theirs, and both compute the same."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from bucket import ADDRESS, server  # noqa: F401
from convert.foreign import assert_same, edit_json, import_tree
from ross_jax import checkpoints
from ross_jax.api import export_model, import_model
from ross_jax.config import UserError
from ross_jax.inference.model import load
from ross_jax.lora import factors_of, updated_kernels
from ross_jax.models.ross import Ross, abstract_params
from ross_jax.tree import flatten
from tiny_model import SIZED, write_model

LAYER = "base_model.model.model.language_model.layers.{}."
PROJECTOR = "base_model.model.model.multi_modal_projector.linear_1"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def write_adapter(folder, changes=None, without=()):
    """An adapter of two ranks: queries of both layers, one of them of rank 5, down of layer 1, and the projector."""
    rng, tensors = np.random.default_rng(0), {}
    sizes = {
        LAYER.format(0) + "self_attn.q_proj": (64, 3, 64),
        LAYER.format(1) + "self_attn.q_proj": (64, 5, 64),
        LAYER.format(1) + "mlp.down_proj": (128, 3, 64),
        PROJECTOR: (32, 3, 64),
    }
    for name, (inputs, rank, outputs) in sizes.items():
        tensors[f"{name}.lora_A.weight"] = rng.normal(0, 0.2, (rank, inputs)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(0, 0.2, (outputs, rank)).astype(np.float32)
    settings = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "down_proj", "linear_1"],
        "rank_pattern": {r"layers\.1\.self_attn.q_proj": 5},
        "alpha_pattern": {"down_proj": 12.0},
    }
    folder.mkdir()
    safetensors.numpy.save_file(
        {k: v for k, v in tensors.items() if k not in without}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(settings | (changes or {})))
    return folder, tensors


def read(folder):
    """Tensors of an exported adapter, and its settings."""
    return (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )


def test_there_and_back(model_folder, tmp_path):
    """Tensors of different ranks come back as they were; merged kernels are the base's plus alpha / rank times B A."""
    adapter, tensors = write_adapter(tmp_path / "adapter")
    model = import_model([model_folder, adapter], tmp_path / "model")
    back, settings = read(export_model(model, tmp_path / "back", layout="peft"))
    assert set(back) == set(tensors) and settings["r"] == 3 and settings["lora_alpha"] == 6.0
    for key, values in tensors.items():
        np.testing.assert_array_equal(back[key], values, err_msg=key)
    name = "model.language_model.layers.1."
    assert settings["rank_pattern"] == {name + "self_attn.q_proj": 5}
    assert settings["alpha_pattern"] == {name + "mlp.down_proj": 12.0}
    again = import_model([model_folder, tmp_path / "back"], tmp_path / "again")
    base, *merged = (
        flatten(checkpoints.restore_model(each, abstract_params(SIZED))) for each in (model_folder, model, again)
    )
    expected = dict(base)
    updates = {"language/layers/query/kernel": [2.0, 6 / 5], "language/layers/down/kernel": [0.0, 4.0]}
    for (path, scales), module in zip(updates.items(), ("self_attn.q_proj", "mlp.down_proj"), strict=True):
        expected[path] = base[path].copy()
        for layer, scale in enumerate(scales):
            a, b = (tensors.get(LAYER.format(layer) + f"{module}.lora_{x}.weight", np.zeros((1, 1))) for x in "AB")
            expected[path][layer] += scale * (b @ a).T
    a, b = (tensors[f"{PROJECTOR}.lora_{x}.weight"] for x in "AB")
    expected["projector/linear_0/kernel"] = base["projector/linear_0/kernel"] + 2.0 * (b @ a).T
    for path, leaf in expected.items():
        for found in merged:
            np.testing.assert_allclose(found[path], leaf, atol=1e-6, err_msg=path)
    assert np.abs(expected["language/layers/query/kernel"] - base["language/layers/query/kernel"]).max() > 0.1
    np.testing.assert_allclose(
        load(model).params["language"]["layers"]["query"]["kernel"], merged[0]["language/layers/query/kernel"]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_into_a_bucket(model_folder, tmp_path):
    """The base is a model directory, or a foreign checkpoint. Exported, the adapter is itself."""
    adapter, tensors = write_adapter(tmp_path / "adapter")
    foreign = export_model(model_folder, tmp_path / "foreign", layout="llava")
    made = [import_model([base, adapter], f"{ADDRESS}/{base.name}") for base in (model_folder, foreign)]
    one, other = (flatten(checkpoints.restore_model(each, checkpoints.model_abstract(made[1]))) for each in made)
    for path, leaf in other.items():
        np.testing.assert_array_equal(leaf, one[path], err_msg=path)
    back = export_model(made[0], f"{ADDRESS}/back", layout="peft") / "adapter_model.safetensors"
    for key, values in safetensors.numpy.load(back.read_bytes()).items():
        np.testing.assert_array_equal(values, tensors.pop(key), err_msg=key)
    assert not tensors


@pytest.mark.slow
def test_every_layout_holds_merged_parameters(model_folder, tmp_path):
    adapter, _ = write_adapter(tmp_path / "adapter")
    model = import_model([model_folder, adapter], tmp_path / "model")
    merged = flatten(checkpoints.restore_model(model, abstract_params(SIZED)))
    for layout in ("ross", "components", "llava", "original-llava", "adapters", "adapters-bin"):
        out = export_model(model, tmp_path / layout, layout=layout)
        parts = [out / name for name in ("llm", "vision_tower", "vae", "adapters")]
        found = import_tree(*(parts if layout == "components" else [out]))
        assert any(path == "projector/linear_0/kernel" for path in found)
        assert_same({path: merged[path] for path in found}, found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not supported"),
        ({"rank_pattern": {"(a+)+": 5}}, "is not supported; expected a module's name"),
        (
            {"r": 4},
            r"wrong shape: model.language_model.layers.0.self_attn.q_proj.lora_A, expected \[4, 64\], found \[3",
        ),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', expected a number above 0"),
        ({"new_method": 1}, "new_method 1 is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model_folder, tmp_path, changes, message):
    adapter, _ = write_adapter(tmp_path / "adapter", changes)
    with pytest.raises(UserError, match=message):
        import_model([model_folder, adapter], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_tensors_that_do_not_fit_are_listed(model_folder, tmp_path):
    adapter, tensors = write_adapter(tmp_path / "adapter", without=[f"{PROJECTOR}.lora_A.weight"])
    with pytest.raises(UserError, match="linear_1: has lora_B alone"):
        import_model([model_folder, adapter], tmp_path / "model")
    extra = {f"{LAYER.format(7)}self_attn.q_proj.lora_A.weight": np.ones((3, 64), np.float32)}
    safetensors.numpy.save_file(tensors | extra, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"unmapped: .*layers\.7\.self_attn"):
        import_model([model_folder, adapter], tmp_path / "model")
    safetensors.numpy.save_file(tensors, adapter / "adapter_model.safetensors")
    model = import_model([model_folder, adapter], tmp_path / "model")
    with pytest.raises(UserError, match="low-rank updates already"):
        import_model([model, adapter], tmp_path / "twice")
    with pytest.raises(UserError, match="has no projector/linear_0/kernel; choose another --base"):
        export_model(model, tmp_path / "out", layout="peft", base="language")
    with pytest.raises(UserError, match="has no low-rank updates"):
        export_model(model_folder, tmp_path / "out", layout="peft")
    with pytest.raises(UserError, match="import it with its base"):
        import_model([adapter], tmp_path / "alone")
    edit_json(adapter / "adapter_config.json", r=None)
    with pytest.raises(UserError, match="r is missing"):
        import_model([model_folder, adapter], tmp_path / "third")


# Against peft itself.


def logits(model, tokens, pixels=None, start=24):
    """Our logits of a row, with an image from `start` on if there is one."""
    config = model.config
    ross = Ross(config)
    images = jnp.zeros((1, 1, 28, 28, 3)) if pixels is None else jnp.asarray(pixels.transpose(0, 2, 3, 1)[:, None])
    ids = jnp.asarray(tokens, jnp.int32)
    inputs = (ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids), images, jnp.asarray([[start]]))
    hidden = ross.apply({"params": model.params}, *inputs).hidden
    return np.asarray(ross.apply({"params": model.params}, hidden, method="logits"))


def hf_llava(transformers, folder):
    """transformers' LLaVA with the parameters of an exported model directory."""
    torch = pytest.importorskip("torch")
    text = transformers.AutoConfig.from_pretrained(folder / "llm")
    tower = transformers.AutoConfig.from_pretrained(folder / "vision_tower")
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=0, vision_feature_select_strategy="full"
    )
    module = transformers.LlavaForConditionalGeneration(config).eval()
    state = {}
    names = (("llm", "model.", "model.language_model."), ("vision_tower", "vision_model.", "model.vision_tower."))
    for part, old, new in names:
        for key, values in safetensors.numpy.load_file(folder / part / "model.safetensors").items():
            state["lm_head.weight" if key == "lm_head.weight" else new + key.removeprefix(old)] = torch.tensor(values)
    adapters = safetensors.numpy.load_file(folder / "adapters" / "mm_projector.safetensors")
    for key, values in adapters.items():
        number, kind = key.removeprefix("model.mm_projector.").split(".")
        state[f"model.multi_modal_projector.linear_{1 + int(number) // 2}.{kind}"] = torch.tensor(values)
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and all("head" in key or "post_layernorm" in key for key in missing), (missing, unexpected)
    return module


@pytest.mark.parity
@pytest.mark.parametrize("base", ["language", "llava"])
def test_peft_and_we_compute_the_same(base, model_folder, tmp_path):
    """An adapter that peft wrote gives its logits here; exported again, peft loads it and gives them, too."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    exported = export_model(model_folder, tmp_path / "parts", layout="components", without=["denoiser", "autoencoder"])

    def build():
        if base == "language":
            return transformers.AutoModelForCausalLM.from_pretrained(exported / "llm", dtype=torch.float32)
        return hf_llava(transformers, exported)

    targets = r".*(language_model|^model)\.layers\.\d+\.(self_attn\.[qo]_proj|mlp\.(up|down)_proj)"
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        use_rslora=True,
        target_modules=targets,
        modules_to_save=["multi_modal_projector"] if base == "llava" else None,
    )
    theirs = peft.get_peft_model(build(), settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, values in theirs.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                values += 0.1 * torch.randn(values.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "theirs")
    rng = np.random.default_rng(0)
    tokens, start = rng.integers(1, 320, (1, 24)), 24
    inputs, pixels = {"input_ids": torch.tensor(tokens)}, None
    if base == "llava":
        tokens[0, 5:9], start = 0, 5
        pixels = rng.normal(size=(1, 3, 28, 28)).astype(np.float32)
        inputs = {"input_ids": torch.tensor(tokens), "pixel_values": torch.tensor(pixels)}
    with torch.no_grad():
        expected = theirs(**inputs).logits.numpy()
        plain = theirs.unload()(**inputs).logits.numpy()
    model = load(import_model([model_folder, tmp_path / "theirs"], tmp_path / "model"))
    found = logits(model, tokens, pixels, start)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.abs(expected - plain).max() > 0.1
    ours = export_model(tmp_path / "model", tmp_path / "ours", layout="peft", base=base)
    loaded = peft.PeftModel.from_pretrained(build(), ours)
    with torch.no_grad():
        np.testing.assert_allclose(loaded(**inputs).logits.numpy(), expected, atol=2e-4)
    stored = flatten(checkpoints.model_abstract(tmp_path / "model", factors=True))
    assert len(updated_kernels(stored)) == 4 and factors_of("language/layers/up/kernel").a in stored
