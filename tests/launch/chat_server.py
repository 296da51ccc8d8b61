"""Starts launch/chat.py with a model whose answers arrive word by word and repeat how they were asked for.

python tests/launch/chat_server.py --checkpoint DIR --port N
"""

import dataclasses
import json
import sys

from launch import chat
from ross_jax.inference.model import Model, load


class Echo(Model):
    """A model that reads images and reconstructs them as they are, and answers with the arguments of its questions."""

    def ask(self, images, prompt, *, history=(), on_text=None, **settings):
        answer = json.dumps({"images": len(images), "prompt": prompt, "history": list(history), **settings})
        for piece in answer.split(" "):
            on_text(f"{piece} ")
        return answer


def echo(*arguments, **settings) -> Echo:
    model = load(*arguments, **settings)
    return Echo(**{field.name: getattr(model, field.name) for field in dataclasses.fields(model)})


if __name__ == "__main__":
    chat.load = echo
    sys.exit(chat.main())
