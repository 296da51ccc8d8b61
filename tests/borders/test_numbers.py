"""Numbers of flags and of config fields: each has a range, and one that is out of it ends in a line that names it."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from absl import flags

from launcher import REPOSITORY, load_script
from ross_jax.arguments import Parser
from ross_jax.command_line import load_recipe
from ross_jax.config import ConfigError, Range, from_dict, to_dict
from ross_jax.convert import known
from ross_jax.convert.autoencoder import autoencoder_config
from ross_jax.models.language import RopeScaling
from ross_jax.plan.workload import Options
from ross_jax.training.precompute import CacheConfig
from ross_jax.training.recipe import RunConfig

ABSURD = (
    -(10**30),
    -930,
    -1,
    0,
    10**9,
    10**30,
    0.5,
    -0.5,
    math.nan,
    math.inf,
    -math.inf,
    True,
    None,
    "many",
    [],
    {},
)
OUTSIDE = (-(10**30), 10**30, math.nan, math.inf, -math.inf)
"""Values outside every range."""


def numbers(hint: Any) -> Iterator[tuple[type, Range | None]]:
    """Type and range of each number in a hint."""
    if typing.get_origin(hint) is Annotated:
        yield hint.__origin__, next((each for each in hint.__metadata__ if isinstance(each, Range)), None)
    elif hint in (int, float):
        yield hint, None
    elif typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        for inner in typing.get_args(hint):
            yield from numbers(inner)


def instances(config: Any) -> Iterator[Any]:
    """The config and every config in it."""
    if dataclasses.is_dataclass(config):
        yield config
        for field in dataclasses.fields(config):
            yield from instances(getattr(config, field.name))
    elif isinstance(config, tuple):
        for each in config:
            yield from instances(each)


def reachable(hint: Any) -> set[type]:
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return {hint}.union(*map(reachable, hints.values()))
    return set().union(*map(reachable, typing.get_args(hint)))


@pytest.fixture(scope="module")
def examples() -> list[Any]:
    """A valid config of every class that a run's config is made of, and of flags that become a config."""
    recipe = f"{REPOSITORY}/configs/ross.py"
    runs = [load_recipe(f"{recipe}:kind={kind}") for kind in ("denoise", "latent,teacher=siglip")]
    tiny = autoencoder_config(known.AUTOENCODERS["madebyollin/taesd"], "taesd")
    found = [*instances(tuple(runs)), tiny, RopeScaling("linear", 2.0), CacheConfig(), Options("x")]
    by_class = {type(each): each for each in found}
    assert by_class.keys() >= reachable(RunConfig)
    return list(by_class.values())


def test_fields_of_configs(examples):
    """Each number has a range. An absurd value is accepted, or refused with the field's name; nothing else happens."""
    without, unnamed = [], []
    for example in examples:
        cls, values = type(example), to_dict(example)
        for name, hint in typing.get_type_hints(cls, include_extras=True).items():
            found = list(numbers(hint))
            without += [f"{cls.__name__}.{name}" for _, within in found if within is None]
            for value in ABSURD:
                inside = typing.get_origin(hint) is tuple and value != []
                items = typing.get_args(hint)
                many = [value] * (1 if Ellipsis in items else len(items))
                try:
                    from_dict(cls, values | {name: many if inside else value})
                except ConfigError as error:
                    if name not in str(error):
                        unnamed.append((cls.__name__, name, value, str(error)))
                else:
                    plain = typing.get_origin(hint) is Annotated
                    assert not (plain and any(value is each for each in OUTSIDE)), (cls, name, value)
    assert without == [] and unnamed == []


LAUNCHERS = {
    "generate": ["--checkpoint", "/nowhere", "--prompt", "x"],
    "reconstruct": ["--checkpoint", "/nowhere", "--images", "/nowhere", "--output", "/nowhere/out"],
    "verify": ["--checkpoint", "/nowhere", "--golden", "/nowhere"],
    "demo": ["--root", "/proc/nowhere"],
    "compare": ["--root", "/proc/nowhere"],
    "inspect_data": ["--template", "v1", "--tokenizer", "/nowhere", "--data", "/nowhere"],
    "bench data": ["--data", "/nowhere"],
    "bench step": ["--config", "/nowhere.py"],
    "convert import": ["--from", "/nowhere", "--output", "/nowhere/out"],
    "convert export": ["--from", "/nowhere", "--format", "ross", "--output", "/nowhere/out"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_flags_of_argparse(launcher, monkeypatch, call, capsys):
    """Every flag with absurd values: one line that names the flag of a number, and never a traceback."""
    actions: dict[str, Any] = {}
    add = Parser.add_argument

    def added(self, *names, **settings):
        action = add(self, *names, **settings)
        if self.prog.endswith(launcher.split()[-1]) or " " not in launcher:
            actions[names[0]] = action
        return action

    monkeypatch.setattr(Parser, "add_argument", added)
    script, *command = launcher.split()

    def run(*arguments: str) -> str:
        try:
            status, _, said = call(script, *command, *LAUNCHERS[launcher], *arguments)
        except SystemExit as stopped:
            status, said = stopped.code, capsys.readouterr().err
        assert status in (1, 2) and "error: " in said, said
        return said

    run()
    for name, action in list(actions.items()):
        if not name.startswith("--") or name == "--help":
            continue
        if action.type in (int, float):
            run(f"{name}={10**9}")
            for value in (-(10**30), 10**30, -930, "nan", "1e400", "many", ""):
                said = run(f"{name}={value}")
                assert name in said or name[2:].replace("-", "_") in said
        elif action.nargs != 0:
            run(f"{name}=/proc/absurd")
        short = name[:-1]
        alone = sum(other.startswith(short) for other in actions) == 1  # --top- could mean --top-k and --top-p
        typed = short if len(name) > 5 and alone else name + "x"
        said = run(typed if action.nargs == 0 else f"{typed}=1")
        assert f"did you mean '{name}'" in said or launcher.startswith("bench"), said


@pytest.mark.parametrize("launcher", ["train", "cache", "plan", "tables"])
def test_flags_of_absl(launcher):
    """Numbers have bounds, or become a config whose fields have; anything else is refused by its parser."""
    values = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "FLAGS", values)
        for kind in ("string", "integer", "float", "bool", "list", "enum"):
            define = getattr(flags, f"DEFINE_{kind}")
            patch.setattr(flags, f"DEFINE_{kind}", lambda *a, define=define, **k: define(*a, flag_values=values, **k))
        patch.setattr("ross_jax.command_line.define_recipe", lambda: None)
        load_script(launcher)
    checked = {"cache": CacheConfig, "plan": Options}.get(launcher)
    names = [field.name for field in dataclasses.fields(checked)] if checked else []
    for name in values:
        parser = values[name].parser
        if isinstance(parser, (flags.IntegerParser, flags.FloatParser)) and name not in names:
            assert parser.lower_bound is not None and parser.upper_bound is not None, name
            for value in ("nan", "many", str(10**30), str(-(10**30))):
                with pytest.raises(ValueError):
                    parser.parse(value)
