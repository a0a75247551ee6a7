"""What several commands share: the names that they are given, and their tables."""

from collections.abc import Iterable, Sequence

from train import tables


def chosen(what: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The known names that are asked for, in the order in which they are known.

    Args:
      what: what they name.
      names: those asked for; none: all.
      known: all that there are.

    Raises:
      ValueError: one is not known.
    """
    names, known = list(names), list(known)
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown {what} {name!r}; known are {', '.join(map(repr, known))}"
            )
    return [name for name in known if not names or name in names]


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
      title: above it; empty: none.
      header: of the columns.
      rows: of as many cells each.
    """
    lines = tables.to_markdown(header, rows)
    return "\n".join([title, "", *lines] if title else lines)
