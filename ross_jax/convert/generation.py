"""The end of answers in the files of a language model: generation_config.json, else config.json."""

from pathlib import Path

from ross_jax.convert.settings import Settings
from ross_jax.convert.sources import read_json

GENERATION_CONFIG = "generation_config.json"


def end_ids(folder: Path) -> tuple[int, ...]:
    """`eos_token_id`, one id or several; empty if the folder does not say it.

    Raises:
      UserError: a file is no JSON object, or the field holds something else.
    """
    for name in (GENERATION_CONFIG, "config.json"):
        if (folder / name).is_file():
            settings = Settings(read_json(folder / name), str(folder / name))
            found = settings.ids("eos_token_id")
            settings.check()
            return found
    return ()
