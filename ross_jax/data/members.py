"""Names of the members of an archive, and where its links lead."""

import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

from ross_jax.data.images import ImageError
from ross_jax.data.spelling import briefly, spellings

_MAX_LINKS = 40  # links on the way to one file, as in Linux


class Index:
    """Names of an archive's members, and where its links lead.

    Args:
      members: the names of files.
      links: name of a link -> name that it leads to, relative to the archive's root. A link that leads out of the
        archive leads to no member.
    """

    def __init__(self, members: Mapping[str, Any], links: Mapping[str, str]):
        self._members, self._links = members, links

    def __iter__(self) -> Iterator[str]:
        yield from self._members
        folders = {parent for name in self._members for parent in parents(name)}
        yield from (name for name in self._links if self._follow(name) not in folders)

    def find(self, name: str) -> str | None:
        """The member or link that a record means by `name`; None if there is none."""
        for spelling in spellings(name):
            found = clean(spelling)
            if found in self._members or found in self._links or self._follow(found) in self._members:
                return found
        return None

    def member(self, name: str) -> Any:
        """What the archive has under a member's name."""
        return self._members[name]

    def target(self, name: str) -> str:
        """The member that holds the bytes of `name`.

        Raises:
          ImageError: it is a link that leads to no member.
        """
        target = self._follow(self.find(name) or name)
        if target not in self._members:
            raise ImageError(f"is a link to {briefly(target)!r}, which is not in the archive")
        return target

    def _follow(self, name: str) -> str:
        """The name with every link in it replaced."""
        for _ in range(_MAX_LINKS if self._links else 0):
            link = next((each for each in (name, *parents(name)) if each in self._links), None)
            if link is None:
                break
            name = posixpath.normpath(self._links[link] + name[len(link) :])
        return name


def parents(name: str) -> Iterator[str]:
    """Folders of a name, the innermost first."""
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def link_target(name: str, target: str) -> str:
    """The name, relative to the archive's root, that the link `name` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target))


def clean(name: str) -> str:
    """A normalised name with forward slashes, but none at its beginning."""
    return posixpath.normpath(name.replace("\\", "/")).lstrip("/")
