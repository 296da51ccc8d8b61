"""What the launchers share: recipes by path, overrides of their fields, and mistakes that end in one line.

    config = load_recipe("configs/ross.py:encoder=siglip,llm=qwen2_7b", ["--config.data.batch=64"])

A recipe is a Python file with a function `get_config` that returns a `ConfigDict`. What stands after the colon is the
function's argument. `--config.FIELD=VALUE` overrides a field, on the command line and here.
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import app, flags
from jaxtyping import TypeCheckError
from ml_collections import ConfigDict, config_flags

from ross_jax.config import ConfigError, UserError, from_dict, nearest, shortened
from ross_jax.console import talk
from ross_jax.process import leave
from ross_jax.storage import is_remote, location
from ross_jax.training.recipe import RunConfig

_PACKAGE_ROOT = Path(__file__).resolve().parents[1]
_FLAG_ERRORS = (flags.Error, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What absl and ml_collections raise for flags that do not exist or do not fit."""


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a run.

    Args:
      recipe: `PATH` or `PATH:ARGUMENTS`.
      overrides: `--config.FIELD=VALUE`, as on a launcher's command line.

    Raises:
      UserError: no such file, a file that fails, no such field, or a value that does not fit.
    """
    values, argv = flags.FlagValues(), ["", f"--config={recipe}", *overrides]
    try:
        holder = define_recipe(values, argv)
        rest = values(argv)[1:]
    except _FLAG_ERRORS as error:
        raise UserError(_message(error)) from error
    if rest:
        raise UserError(f"unexpected arguments {rest}")
    return from_dict(RunConfig, holder.value.to_dict())


def define_recipe(values: flags.FlagValues = flags.FLAGS, argv: list[str] | None = None) -> flags.FlagHolder:
    """Defines the flag `--config` of a launcher; its value is the recipe's locked `ConfigDict`, overrides included.

    Args:
      values: where the flag is defined.
      argv: searched for overrides. None: the command line of this process.
    """
    help_text = "PATH or PATH:ARGUMENTS of a recipe; --config.FIELD=VALUE overrides a field."
    holder = config_flags.DEFINE_config_file("config", None, help_text, values, sys_argv=argv)
    flags.mark_flag_as_required("config", values)
    values["config"].parser = _RecipeParser(argv)  # ml_collections' own shows tracebacks, and sets no import path
    return holder


class _RecipeParser(flags.ArgumentParser):
    def __init__(self, argv: list[str] | None):
        self._argv = argv

    def parse(self, argument: str) -> ConfigDict:
        path, *arguments = re.split(r":(?!//)", argument, maxsplit=1)
        recipe = import_recipe(path)
        with _running(location(path)):
            config = recipe.get_config(*arguments)
        if not isinstance(config, ConfigDict):
            raise UserError(f"{path}: get_config() returns {type(config).__name__}, not ConfigDict")
        _check_fields(config, sys.argv if self._argv is None else self._argv)
        return config.lock()


def _check_fields(config: ConfigDict, argv: Sequence[str]) -> None:
    """Raises ConfigError for an override of a field that does not exist. ml_collections does not name the section."""
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([\w.\[\]]+)", argument)
        if not match and argument.startswith(("--config.", "-config.")):
            raise ConfigError(f"{argument[:100]}: names no field")
        node: Any = config
        path = "config"
        for name in re.findall(r"\[\d+\]|[^.\[]+|(?<=\.)$", match[1]) if match else ():
            if name.startswith("[") and isinstance(node, (tuple, list)):
                if int(name[1:-1]) >= len(node):
                    raise ConfigError(f"{path}{name}: {path} has {len(node)} value(s), counted from 0")
                node, path = node[int(name[1:-1])], path + name
                continue
            if not isinstance(node, (ConfigDict, dict)):
                several = isinstance(node, (tuple, list))
                hint = f"set all of {path}, or name one: {path}[0]" if several else f"set {path} itself"
                raise ConfigError(f"{path}.{name}: no such field; {hint}")
            if name not in node:
                raise ConfigError(f"{path}.{name}: no such field{nearest(name, node)}")
            node, path = node[name], f"{path}.{name}"


def import_recipe(path: str | Path) -> ModuleType:
    """The module of a recipe's file, which may lie in a bucket.

    Recipes may build on one another: `from configs import ross` finds the folder `configs` beside the recipe's own
    folder, or in this repository.

    Raises:
      UserError: no such file, a file that fails, or one without `get_config`.
    """
    path = location(path)
    if not path.is_file():
        near = nearest(path.name, (file.name for file in path.parent.glob("*.py")))
        raise UserError(f"{path}: no such file{near}")
    module = ModuleType(f"recipe_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    with _running(path):
        if is_remote(path):
            exec(compile(path.read_text(), str(path), "exec", dont_inherit=True), module.__dict__)
        else:
            SourceFileLoader(module.__name__, str(path)).exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{path}: has no function get_config, which returns a recipe's config")
    return module


@contextlib.contextmanager
def _running(path: Path) -> Iterator[None]:
    """While code of a recipe runs: what it may import, and what becomes of its exceptions."""
    before = sys.path
    sys.path = [str(path.resolve().parent.parent), str(_PACKAGE_ROOT), *before]
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}" if error.lineno else str(path)
        raise UserError(f"{where}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    finally:
        sys.path = before


def run(main: Callable[[], int]) -> None:
    """Reads the flags, loads the recipe, and exits with the status that `main` returns."""
    leave(lambda: app.run(lambda _: _until_nobody_reads(main), flags_parser=_parse))


def _until_nobody_reads(main: Callable[[], int]) -> int:
    """The status of `main`, or 1 if its output goes nowhere, as behind `| head`."""
    talk()
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered
        return 1
    except TypeCheckError as error:  # ROSS_JAX_CHECK_SHAPES; each checked function adds four lines to a traceback
        frames = traceback.extract_tb(error.__traceback__)
        caller = [frame for frame in frames if "site-packages" not in frame.filename][-1]
        return _failure(f"{error}\nCalled in {caller.filename}, line {caller.lineno}: {caller.line}")


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except (UserError, *_FLAG_ERRORS) as error:
        sys.exit(_failure(_message(error)))
    if len(rest) > 1:
        sys.exit(_failure(f"unexpected arguments {rest[1:]}"))
    return rest


def _message(error: BaseException) -> str:
    if isinstance(error, RecursionError):  # absl looks for a similar flag
        return "a flag's name has hundreds of characters, which no flag has"
    text = " ".join(map(str, error.args)) or str(error)
    absent = re.findall(r"^flag --(\w+)=None: Flag --\w+ must have a value", text, re.MULTILINE)
    return f"{' and '.join(f'--{name}' for name in absent)}: required" if absent else shortened(text)


def _failure(text: Any) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 1
