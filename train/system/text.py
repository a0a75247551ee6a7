"""Messages that quote text from outside: shortened, without control characters."""

import re
from collections.abc import Callable, Collection, Iterable

# Characters that are shown of a text, and items that are shown of a list.
_MAX_CHARACTERS = 100
_MAX_ITEMS = 10
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Returns the text with its control characters escaped, except "\n" and "\t".

    A terminal would otherwise obey them: "\x1b[31m" colours the text that follows.
    """
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def shorten(
    value: object, longest: int = _MAX_CHARACTERS, write: Callable[[object], str] = str
) -> str:
    """Returns a value as one line of text, without its middle if it is too long.

    Args:
      value: the value, usually a text or a number.
      longest: number of characters that are shown of the value.
      write: converts the value to text.
    """
    try:
        text = write(value)
    except Exception as error:  # Python refuses to write an integer of 5,000 digits
        text = f"one {type(value).__name__} ({error})"
    text = printable(text).replace("\n", "\\n")
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


def shorten_repr(value: object) -> str:
    """Returns the `repr` of a value, shortened as by `shorten`."""
    return shorten(value, write=repr)


def join_names(values: Iterable[object]) -> str:
    """Returns the first ten values, comma-separated, and the number of the others."""
    values = [*values]
    more = f" and {len(values) - _MAX_ITEMS} more" if len(values) > _MAX_ITEMS else ""
    return ", ".join(map(shorten, values[:_MAX_ITEMS])) + more


def join_lines(values: Collection[str]) -> str:
    r"""Returns the first ten values and the number of the others, as indented lines.

    A line break precedes each line: ["a", "b"] -> "\n  a\n  b".
    """
    shown_lines = [*values][:_MAX_ITEMS]
    if len(values) > _MAX_ITEMS:
        shown_lines.append(f"... and {len(values) - _MAX_ITEMS} more")
    return "".join(f"\n  {line}" for line in shown_lines)
