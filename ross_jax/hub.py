"""Ids of the Hugging Face hub: which names can be one, and whether the hub answers. `hub_answers` asks it once."""

import logging
import re
from pathlib import Path

logger = logging.getLogger(__name__)

_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
SECONDS = 10
"""Seconds in which the hub must begin to answer."""


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder can be an id `owner/name`. Where `owner` is a folder, it is a mistyped path."""
    return bool(_ID.fullmatch(name)) and not Path(name).parent.exists()


def say_asked(name: str) -> None:
    """Says that the hub is asked for a name that is no folder."""
    logger.warning("%s: there is no such folder; asking the Hugging Face hub for it", name)


def hub_answers(name: str) -> bool:
    """Whether the hub can be reached, even if it has no `owner/name`. Its clients would retry for half a minute."""
    import huggingface_hub  # takes half a second to import
    from huggingface_hub.errors import HfHubHTTPError

    try:
        huggingface_hub.HfApi().model_info(name, timeout=SECONDS)
    except HfHubHTTPError:
        return True
    except Exception:  # no connection: the hub's HTTP library raises errors of many kinds
        return False
    return True
