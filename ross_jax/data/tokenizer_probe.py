"""Reads a tokenizer's files and renders its chat template, as a script in a process with limits.

The Rust and C++ libraries that read vocabularies may abort their process, and a chat template is a program. So
`tokenizer_check` runs this file first, and learns from its output or its end what would happen.

    stdin    {"packages": [folders of packages], "vocabulary": [files], "text": what they encode,
              "template": a chat template or null, "seconds": limit of processor time}
    stdout   "> NAME" as each step begins, and after the one that fails, the reason
"""

import contextlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

_RESERVE = 2**28  # bytes for the packages
_PER_BYTE = 24  # bytes of memory for each byte of a vocabulary's file
_RENDERING = 2**28  # bytes that rendering may take
_MOST_OUTPUT = 2**20  # characters
_TURNS = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]


def _limit_memory(more: int) -> None:
    statistics, most = Path("/proc/self/statm"), resource.getrlimit(resource.RLIMIT_AS)[1]
    pages = int(statistics.read_text().split()[0]) if statistics.exists() else 0
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _read(path: Path, text: str) -> None:
    """Reads a vocabulary and encodes a text."""
    if path.suffix == ".json":
        from tokenizers import Tokenizer

        Tokenizer.from_str(path.read_text(encoding="utf-8")).encode(text)
    else:
        import sentencepiece

        sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text)


def _render(template: str) -> str | None:
    """What is wrong with a chat template, rendered as by transformers; None if nothing is.

    A template that refuses the conversation by `raise_exception` is sound.
    """
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Refusal(Exception):
        pass

    def refuse(message: str) -> None:
        raise Refusal

    class Generation(jinja2.ext.Extension):
        """The block `{% generation %}`, which transformers adds to the language."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    short_of_memory = False

    def watch(frame: Any, event: str, argument: Any) -> Any:
        """Notes a MemoryError that Jinja swallows while it computes constants: a process without limits has none."""
        nonlocal short_of_memory
        short_of_memory |= event == "exception" and issubclass(argument[0], MemoryError)
        return watch

    environment.filters["tojson"] = lambda value, **options: json.dumps(value)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    messages = [{"role": role, "content": text} for role, text in _TURNS]
    variables: dict[str, Any] = {f"{name}_token": "" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")}
    variables |= {"tools": None, "documents": None}
    try:
        sys.settrace(watch)
        compiled = environment.from_string(template)
        sys.settrace(None)
        if short_of_memory:
            raise MemoryError
        for count in (1, len(messages)):
            length, variables["messages"], variables["add_generation_prompt"] = 0, messages[:count], count == 1
            with contextlib.suppress(Refusal):
                for piece in compiled.generate(**variables):
                    length += len(piece)
                    if length > _MOST_OUTPUT:
                        return f"prints more than {_MOST_OUTPUT} characters for a short conversation"
    except MemoryError:
        return "takes too much memory"
    except Exception as error:
        return f"fails: {type(error).__name__}: {error}"
    return None


def main() -> None:
    task = json.load(sys.stdin)
    sys.path += task["packages"]
    resource.setrlimit(resource.RLIMIT_CPU, (task["seconds"], task["seconds"] + 1))
    for path in map(Path, task["vocabulary"]):
        print(f"> {path.name}", flush=True)
        _limit_memory(_RESERVE + _PER_BYTE * path.stat().st_size)
        try:
            _read(path, task["text"])
        except Exception:  # transformers reads some files that the library refuses, and reports the others
            continue
        except BaseException as error:  # PanicException of Rust is no Exception
            print(f"breaks the library that reads it ({error})")
            return
    if task["template"] is not None:
        print("> template", flush=True)
        _limit_memory(_RENDERING)
        print(_render(task["template"]) or "")


if __name__ == "__main__":
    main()
