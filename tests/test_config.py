"""Typed configs: valid values, and the error for each kind of mistake."""

import dataclasses
import json
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ross_jax.config import ConfigError, UserError, from_dict, nearest, to_dict
from ross_jax.models.autoencoder import AutoencoderConfig
from ross_jax.models.denoiser import DenoiserConfig
from ross_jax.models.language import LanguageConfig, RopeScaling
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import RossConfig
from ross_jax.models.tiny_autoencoder import TinyAutoencoderConfig
from ross_jax.models.vision import VisionConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 0.5

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size {self.size} is negative")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str = "x"
    kind: Literal["mse", "cosine"] = "mse"
    maybe: Inner | None = None
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    flag: bool = False
    count: int | None = None
    number_or_name: int | str = 1
    inners: tuple[Inner, ...] = ()
    anything: Any = None
    made: tuple[int, ...] = dataclasses.field(default_factory=tuple)


INNER = {"size": 3}


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, {}),
        ({"inner": {"size": 4, "rate": 2}}, {"inner": Inner(4, 2.0)}),
        ({"inner": Inner(5)}, {"inner": Inner(5)}),
        ({"maybe": {"size": 1}}, {"maybe": Inner(1)}),
        ({"maybe": None, "count": None}, {}),
        ({"sizes": [1, 2]}, {"sizes": (1, 2)}),
        ({"sizes": ()}, {}),
        ({"pair": [2, "b"]}, {"pair": (2, "b")}),
        ({"inners": [{"size": 1}, Inner(2)]}, {"inners": (Inner(1), Inner(2))}),
        ({"kind": "cosine"}, {"kind": "cosine"}),
        ({"flag": True, "count": 7}, {"flag": True, "count": 7}),
        ({"number_or_name": "n"}, {"number_or_name": "n"}),
        ({"anything": {"a": [1]}}, {"anything": {"a": [1]}}),
    ],
)
def test_values_that_make_a_config(values, expected):
    config = from_dict(Outer, {"inner": INNER, **values})
    assert config == dataclasses.replace(Outer(Inner(3)), **expected)
    assert from_dict(Outer, to_dict(config)) == config


def test_values_have_the_declared_types():
    config = from_dict(Outer, {"inner": {"size": 1, "rate": 3}})
    assert type(config.inner.rate) is float
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "y"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"nmae": "y"}, r"config\.nmae: no such field \(did you mean 'name'\?\); Outer has \['anything', 'count',"),
        ({"zzz": 1}, r"config\.zzz: no such field; Outer has"),
        ({"inner": {"size": 1, "rat": 2}}, r"config\.inner\.rat: no such field \(did you mean 'rate'\?\); Inner has"),
        ({"inner": {}}, r"config\.inner\.size: missing, and it has no default"),
        ({"inner": 3}, r"config\.inner: expected a mapping for Inner, found int"),
        ({"inner": None}, r"config\.inner: expected a mapping for Inner, found NoneType"),
        ({"inner": {"size": "3"}}, r"config\.inner\.size: expected int, found '3' \(str\)"),
        ({"inner": {"size": 3.0}}, r"config\.inner\.size: expected int, found 3\.0 \(float\)"),
        ({"inner": {"size": True}}, r"config\.inner\.size: expected int, found True \(bool\)"),
        ({"inner": {"size": 1, "rate": False}}, r"config\.inner\.rate: expected float, found False \(bool\)"),
        ({"inner": {"size": 1, "rate": "1"}}, r"config\.inner\.rate: expected float, found '1' \(str\)"),
        ({"inner": {"size": -1}}, r"config\.inner: size -1 is negative"),
        ({"maybe": {"size": -1}}, r"config\.maybe: size -1 is negative"),
        ({"inners": [{"size": 1}, {"size": -1}]}, r"config\.inners\[1\]: size -1 is negative"),
        ({"inners": [{"size": 1}, {"size": "x"}]}, r"config\.inners\[1\]\.size: expected int"),
        ({"flag": 1}, r"config\.flag: expected bool, found 1 \(int\)"),
        ({"count": "many"}, r"config\.count: expected int, found 'many'"),
        ({"count": True}, r"config\.count: expected int, found True"),
        ({"name": None}, r"config\.name: expected str, found None"),
        ({"kind": "mes"}, r"config\.kind: 'mes' is none of \['mse', 'cosine'\] \(did you mean 'mse'\?\)"),
        ({"kind": ["mse"]}, r"config\.kind: \['mse'\] is none of"),
        ({"kind": None}, r"config\.kind: None is none of"),
        ({"sizes": 3}, r"config\.sizes: expected tuple.*found 3 \(int\)"),
        ({"sizes": "12"}, r"config\.sizes: expected tuple.*found '12' \(str\)"),
        ({"sizes": [1, "2"]}, r"config\.sizes\[1\]: expected int, found '2'"),
        ({"pair": [1]}, r"config\.pair: expected 2 values, found 1"),
        ({"pair": [1, 2]}, r"config\.pair\[1\]: expected str, found 2"),
        ({"number_or_name": 1.5}, r"config\.number_or_name: expected .*found 1\.5"),
    ],
)
def test_values_that_make_no_config(values, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        from_dict(Outer, {"inner": INNER, **values})
    with pytest.raises(UserError, match=f"^{message.replace('config', 'recipe', 1)}"):
        from_dict(Outer, {"inner": INNER, **values}, "recipe")


def test_values_that_are_no_mapping():
    for value in (None, [], 3, "x"):
        with pytest.raises(ConfigError, match=f"config: expected a mapping for Inner, found {type(value).__name__}"):
            from_dict(Inner, value)


def test_nearest():
    assert nearest("hiden", ["hidden", "heads"]) == " (did you mean 'hidden'?)"
    assert nearest("zzz", ["hidden"]) == nearest("x", []) == ""


# Configs of models, as stored in manifests.

SIZES = st.integers(1, 9)
FLOATS = st.floats(1e-6, 1e6)
FLAGS = st.booleans()


@st.composite
def ross_configs(draw) -> dict:
    """Draws consistent fields of a RossConfig as plain values."""
    hidden, width = 4 * draw(SIZES), 2 * draw(SIZES)
    rope = st.none() | st.builds(RopeScaling, st.sampled_from(["linear", "llama3"]), FLOATS, FLOATS, FLOATS, SIZES)
    levels = draw(st.integers(1, 3))
    attention = st.lists(FLAGS, min_size=levels, max_size=levels)
    patch, grid = draw(SIZES), draw(SIZES)
    choices = {
        "vision": {
            "kind": draw(st.sampled_from(["siglip", "clip"])),
            "image_size": patch * grid,
            "patch_size": patch,
            "hidden_size": hidden,
            "intermediate_size": draw(SIZES),
            "num_layers": 4,
            "num_heads": 4,
            "activation": draw(st.sampled_from(["gelu_tanh", "quick_gelu", "gelu"])),
            "norm_eps": draw(FLOATS),
            "select_layer": draw(st.integers(-5, 4)),
        },
        "projector": {"kind": "mlp", "in_size": hidden, "out_size": width, "depth": draw(SIZES)},
        "language": {
            **{name: draw(SIZES) for name in ("vocab_size", "intermediate_size", "num_layers")},
            **{name: draw(FLAGS) for name in ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "tied_head")},
            "hidden_size": width,
            "num_heads": 4,
            "num_kv_heads": draw(st.sampled_from([1, 2, 4])),
            "head_dim": 2 * draw(SIZES),
            "rope_theta": draw(FLOATS),
            "norm_eps": draw(FLOATS),
            "rope_scaling": to_dict(draw(rope)),
        },
        "denoiser": {
            "condition_size": width,
            "grid": grid,
            "width": 16 * draw(SIZES),
            "mlp_ratio": draw(FLOATS),
        },
        "autoencoder": {
            "channels": [2 * draw(SIZES) for _ in range(levels)],
            **{name: draw(SIZES) for name in ("layers_per_block", "latent_channels")},
            "norm_groups": 2,
            "scaling_factor": draw(FLOATS),
            "shift_factor": draw(st.floats(-1, 1)),
            "down_attention": draw(attention),
            "up_attention": draw(attention),
            **{name: draw(FLAGS) for name in ("mid_attention", "quant_conv", "post_quant_conv")},
        },
    }
    if draw(FLAGS):
        choices["autoencoder"] = {
            "kind": "tiny",
            **{name: draw(SIZES) for name in ("encoder_channels", "decoder_channels", "latent_channels")},
            **{f"{half}_blocks": [draw(SIZES) for _ in range(levels)] for half in ("encoder", "decoder")},
            "scaling_factor": draw(FLOATS),
        }
    window = 16 // 2 ** (levels - 1)
    choices["denoiser"]["latent_size"] = choices["autoencoder"]["latent_channels"] * window**2
    chosen = {name: fields for name, fields in choices.items() if draw(FLAGS)}
    return chosen | {"image_mean": [draw(st.floats(0, 1)) for _ in range(3)]}


@settings(max_examples=100, deadline=None)
@given(ross_configs())
def test_ross_config_survives_json(values):
    config = from_dict(RossConfig, values)
    classes = [VisionConfig, ProjectorConfig, LanguageConfig, DenoiserConfig, AutoencoderConfig]
    if values.get("autoencoder", {}).get("kind") == "tiny":
        classes[-1] = TinyAutoencoderConfig
    for name, cls in zip(["vision", "projector", "language", "denoiser", "autoencoder"], classes, strict=True):
        assert isinstance(getattr(config, name), cls if name in values else type(None))
    plain = to_dict(config)
    again = from_dict(RossConfig, json.loads(json.dumps(plain)))
    assert again == config and hash(again) == hash(config) and to_dict(again) == plain
    for name in ("vision", "language", "denoiser", "autoencoder"):
        if name in values:
            assert plain[name].items() >= values[name].items()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"projector": {"kind": "mlp", "in_size": 3, "out_size": 8}},
            "config: projector.in_size is 3 but vision.hidden",
        ),
        ({"vision": {"num_heads": 3}}, r"config\.vision: hidden_size 8 is not a multiple of num_heads 3"),
        ({"vision": {"kind": "dino"}}, r"config\.vision\.kind: 'dino' is none of \['siglip', 'clip', 'dinov2'\]"),
        ({"vision": {"final_norm": True}}, r"config\.vision: final_norm: clip has no norm of its patch features"),
        ({"vision": {"registers": 4}}, r"config\.vision: registers 4 and swiglu False are dinov2's; clip has neither"),
        ({"vision": {"swiglu": True}}, r"config\.vision: registers 0 and swiglu True are dinov2's; clip has neither"),
        ({"image_mean": [0.5, 0.5]}, r"config\.image_mean: expected 3 values, found 2"),
        (
            {"autoencoder": {"kind": "tny"}},
            r"config\.autoencoder\.kind: 'tny' is none of \['kl', 'tiny'\] \(did you mean",
        ),
        ({"autoencoder": {"kind": ["kl"]}}, r"config\.autoencoder\.kind: \['kl'\] is none of \['kl', 'tiny'\]"),
        ({"autoencoder": {"kind": "tiny", "channels": [8]}}, r"config\.autoencoder\.channels: no such field"),
        ({"autoencoder": {"kind": "tiny"}}, r"config\.autoencoder\.encoder_channels: missing"),
        (
            {"autoencoder": {"encoder_channels": 8}},
            r"config\.autoencoder\.encoder_channels: no such field.*; Autoencoder",
        ),
        ({"autoencoder": 3}, r"config\.autoencoder: expected a mapping for AutoencoderConfig, found int"),
    ],
)
def test_ross_configs_that_do_not_fit(changes, message):
    vision = dict(
        kind="clip", image_size=8, patch_size=4, hidden_size=8, intermediate_size=4, num_layers=1, num_heads=2
    )
    vision |= {"activation": "gelu", "norm_eps": 1e-5} | changes.pop("vision", {})
    with pytest.raises(ConfigError, match=message):
        from_dict(RossConfig, {"vision": vision, **changes})
