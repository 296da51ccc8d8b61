"""generation_config.json: which ids end an answer."""

from pathlib import Path

from ross_jax.convert.settings import Settings
from ross_jax.convert.sources import read_json

GENERATION_CONFIG = "generation_config.json"


def end_ids(path: Path) -> tuple[int, ...]:
    """`eos_token_id` of a generation_config.json, one id or several; empty if there is no such file.

    Raises:
      UserError: the file is no JSON object, or the field holds something else.
    """
    if not path.is_file():
        return ()
    settings = Settings(read_json(path), str(path))
    found = settings.ids("eos_token_id")
    settings.check()
    return found
