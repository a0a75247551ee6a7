"""Text from outside in messages: short, and without control characters."""

import re
from collections.abc import Callable, Collection, Iterable

# Characters of a name, and names of a list, that are shown.
_LONGEST = 100
_MOST = 10
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Returns the text with its control characters escaped, but for "\n" and "\t".

    A terminal would otherwise do what they say.
    """
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def shown(
    value: object, longest: int = _LONGEST, write: Callable[[object], str] = str
) -> str:
    """Returns a text or a number on one line, its middle left out where it is long."""
    try:
        text = write(value)
    except Exception as error:  # Python writes no whole number of 5,000 digits
        text = f"one {type(value).__name__} ({error})"
    text = printable(text).replace("\n", "\\n")
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


def literal(value: object) -> str:
    """Returns a value as `shown`, with the quotes that a text has in Python."""
    return shown(value, write=repr)


def names(values: Iterable[object]) -> str:
    """Returns the first of some names, and how many there are beside them."""
    values = [*values]
    more = f" and {len(values) - _MOST} more" if len(values) > _MOST else ""
    return ", ".join(map(shown, values[:_MOST])) + more


def lines(values: Collection[str]) -> str:
    """Returns the first of some lines, each indented, and how many there are beside."""
    shown_lines = [*values][:_MOST]
    if len(values) > _MOST:
        shown_lines.append(f"... and {len(values) - _MOST} more")
    return "".join(f"\n  {line}" for line in shown_lines)
