"""Recipes by path: their imports, overrides of fields, and one line for each mistake."""

import sys
from pathlib import Path

import pytest

from ross_jax.command_line import import_recipe, load_recipe
from ross_jax.config import ConfigError, UserError

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"
BENCH = str(CONFIGS / "bench.py")


def test_overrides():
    """Overrides have command-line syntax, and may set fields whose default is None."""
    config = load_recipe(
        f"{CONFIGS / 'llava.py'}:encoder=clip,stage=pretrain",
        [
            "--config.data.batch=9",
            "--config.seed",
            "3",
            "--config.data.packing.supervised=100",
            "--config.loop.expected_reconstruction=(0.1, 0.2)",
            "--config.init=('a', 'b')",
        ],
    )
    assert config.model.vision.kind == "clip" and config.freeze.trainable[0] == "projector/.*"
    assert (config.data.batch, config.seed, config.init) == (9, 3, ("a", "b"))
    assert (config.data.packing.supervised, config.loop.expected_reconstruction) == (100, (0.1, 0.2))
    assert load_recipe(str(CONFIGS / "llava.py")).data.packing.supervised is None


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Changes to a folder outside the repository, where `configs` cannot be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() not in (REPOSITORY, tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_own_recipes_build_on_the_repositorys(outside):
    """A recipe in any folder can import `configs` and modules of its parent folder."""
    (outside / "recipes").mkdir()
    (outside / "own_settings.py").write_text("BATCH = 12\n")
    recipe = outside / "recipes" / "mine.py"
    recipe.write_text(
        "def get_config(arguments=None):\n"
        "    from configs import bench\n"
        "    import own_settings\n"
        "    config = bench.get_config()\n"
        "    config.data.batch = own_settings.BATCH\n"
        "    return config\n"
    )
    before = list(sys.path)
    assert load_recipe(str(recipe)).data.batch == 12
    assert sys.path == before
    assert callable(import_recipe("recipes/mine.py").get_config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.data.batchs=1"], r"^config\.data\.batchs: no such field \(did you mean 'batch'\?\)$"),
        (["--config.dat.batch=1"], r"^config\.dat: no such field \(did you mean 'data'\?\)$"),
        (["--config.data.batch=many"], r"^flag --config\.data\.batch=many: invalid literal for int"),
        (["--config.step.remat=ful"], r"^config\.step\.remat: 'ful' is none of .* \(did you mean 'full'\?\)$"),
        (["--config.data.sources[0].pth=x"], r"^config\.data\.sources\[0\]\.pth: no such field \(did you mean 'path'"),
        (["--config.data.sources[9].path=x"], r"^config\.data\.sources\[9\]: config\.data\.sources has 1 value"),
        (["--config.data.sources.path=x"], r"^config\.data\.sources\.path: no such field; .*sources\[0\]"),
        (["--config.seed.x=1"], r"^config\.seed\.x: no such field; set config\.seed itself$"),
        (["--config.freeze.trainable=('(',)"], r"^config\.freeze: trainable: '\(' is no pattern"),
        (["--config.freeze.dtype=flot32"], r"^config\.freeze\.dtype: 'flot32' is none of .*did you mean 'float32'"),
        (["--conf.data.batch=1"], r"^Unknown command line flag 'conf\.data\.batch'"),
        (["more"], r"^unexpected arguments \['more'\]$"),
    ],
)
def test_overrides_that_do_not_fit(overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe(BENCH, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef get_config(:\n", r"recipe\.py, line 2: invalid syntax$"),
        ("import absent_module\n", r"recipe\.py, line 1: ModuleNotFoundError: No module named 'absent_module'$"),
        ("def get_config():\n    return {}['a']\n", r"recipe\.py, line 2: KeyError: 'a'$"),
        ("def get_config():\n    return {}\n", r"recipe\.py: get_config\(\) returns dict, not ConfigDict$"),
        ("config = 1\n", r"recipe\.py: has no function get_config, which returns a recipe's config$"),
        ("from configs import ross\nget_config = lambda: ross.get_config('llm=qwen')\n", "^llm='qwen': unknown"),
    ],
)
def test_recipes_that_are_broken(text, message, tmp_path):
    (tmp_path / "recipe.py").write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(tmp_path / "recipe.py"))


def test_recipes_that_are_not_there():
    with pytest.raises(UserError, match=r"configs/benhc\.py: no such file \(did you mean 'bench\.py'\?\)$"):
        load_recipe(str(CONFIGS / "benhc.py") + ":a=b")
    with pytest.raises(UserError, match="takes 0 positional arguments but 1 was given"):
        load_recipe(f"{BENCH}:a=b")
    with pytest.raises(ConfigError, match=r"^config\.data: batch is 0; it must be at least 1$"):
        load_recipe(BENCH, ["--config.data.batch=0"])
