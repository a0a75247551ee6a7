"""Selects layers of a model by globs for their paths."""

import dataclasses
import fnmatch
from collections.abc import Collection, Sequence


@dataclasses.dataclass(frozen=True)
class Matching:
    """Globs that select layers of a model.

    Attributes:
      skip_first: whether the model's first layer is left out.
      only: globs for the paths of the selected layers; `None`: all layers.
      exclude: globs for the paths of layers that are left out, even if `only` has them.
    """

    skip_first: bool
    only: tuple[str, ...] | None
    exclude: tuple[str, ...]

    def selects(self, path: str, first: str | None) -> bool:
        """Returns whether the layer of a path is selected.

        Args:
          path: the names on the way to the layer, joined by "/".
          first: the path of the model's first layer; `None`: unknown.
        """
        if self.skip_first and path == first:
            return False
        if any(fnmatch.fnmatchcase(path, glob) for glob in self.exclude):
            return False
        return self.only is None or any(
            fnmatch.fnmatchcase(path, glob) for glob in self.only
        )

    def check(self, paths: Collection[str], firsts: Collection[str]) -> None:
        """Checks that every glob matches a layer.

        With `skip_first` a glob of `only` has to match a layer that is not in `firsts`.

        Args:
          paths: the paths of all layers.
          firsts: the paths of the layers that are first in every call of the model.

        Raises:
          ValueError: a glob matches no layer.
        """
        rest = [p for p in paths if not (self.skip_first and p in firsts)]
        unmatched = [g for g in self.only or () if not fnmatch.filter(rest, g)]
        unmatched += [g for g in self.exclude if not fnmatch.filter(paths, g)]
        if unmatched:
            but = " but the first, which skip_first leaves alone," if firsts else ""
            raise ValueError(
                f"No layer{but if self.skip_first else ''} matches "
                f"{', '.join(map(repr, unmatched))}; the layers are "
                f"{', '.join(map(repr, paths))}."
            )


def matching(
    skip_first: bool,
    only: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> Matching:
    """Returns the globs given as arguments of `linen.intercept` or `nnx.apply`.

    Raises:
      TypeError: a glob is not a string.
      ValueError: `only` is empty.
    """
    if only is not None and not only:
        raise ValueError(f"only={only!r} matches no layer; leave it out for all.")
    return Matching(
        skip_first,
        None if only is None else _globs("only", only),
        () if exclude is None else _globs("exclude", exclude),
    )


def _globs(field: str, globs: str | Sequence[str]) -> tuple[str, ...]:
    listed = (globs,) if isinstance(globs, str) else globs
    if not (
        isinstance(listed, Sequence) and all(isinstance(glob, str) for glob in listed)
    ):
        raise TypeError(f"{field} takes a glob or several, as strings; got {globs!r}.")
    return tuple(listed)
