"""Values of the wrong kind for every field of a config, on the command line, and recipes that are none."""

import pytest

from launcher import write_recipe
from ross_jax.command_line import load_recipe
from ross_jax.config import UserError
from ross_jax.training.run import flatten_config

WRONG = ("[", "'", "", "many", "nan", "1e999", "{'a': 1}", "((('x',),),)", "9" * 5000, "\ud800")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    write_recipe(folder)
    return folder


@pytest.mark.slow
def test_every_field_refuses_other_kinds(folder):
    """A number or a boolean takes no text, a tuple no text that is no tuple; the error names the field in one line."""
    recipe = str(folder / "recipe.py")
    fields = flatten_config(load_recipe(recipe))
    assert len(fields) > 100
    for name, value in fields.items():
        for wrong in WRONG:
            try:
                load_recipe(recipe, [f"--config.{name}={wrong}"])
            except UserError as error:
                said = str(error)
                assert "\n" not in said and len(said) < 1100, (name, wrong, said)
                assert name.rpartition(".")[2] in said, (name, wrong, said)
            else:
                assert not isinstance(value, (bool, int, float)), (name, wrong)


RANGES = {
    "model.language.num_layers=-1": r"num_layers is -1; it must be at least 1",
    "model.language.num_layers=1001": r"num_layers is 1001; it must be at most 1000",
    "data.max_image_bytes=0": r"max_image_bytes is 0; it must be at least 1",
    "freeze.trainable=[": r"trainable: '\[' is no pattern",
    "data.sources=3": r"config\.data\.sources",
    "data.sources=({'path': 3},)": r"config\.data\.sources\[0\]\.path: expected str, found 3",
    "model=3": r"--config\.model=3",
    "=3": r"--config\.=3: names no field",
    "x" * 2000 + "=3": r"no such field|hundreds of characters",
}


@pytest.mark.parametrize("flag", RANGES, ids=lambda flag: flag[:40])
def test_errors_tell_field_and_range(folder, flag):
    with pytest.raises(UserError, match=RANGES[flag]):
        load_recipe(str(folder / "recipe.py"), [f"--config.{flag}"])


RECIPES = {
    "binary": b"\x7fELF\0\1",
    "text": b"hello world",
    "latin": b"x = '\xff'",
    "empty": b"",
    "deep": b"(" * 5000,
    "signs": b"x = " + b"-" * 200_000 + b"1",
    "endless": b"def get_config(): return get_config()",
    "number": b"def get_config(): return 3",
    "ends": b"raise SystemExit(0)",
}


@pytest.mark.parametrize("name", RECIPES)
def test_files_that_are_no_recipe(folder, name):
    path = folder / f"{name}.py"
    path.write_bytes(RECIPES[name])
    with pytest.raises(UserError, match=str(path)) as raised:
        load_recipe(str(path))
    assert "\n" not in str(raised.value)
