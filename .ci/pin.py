"""Prints constraints.txt, from what `pip freeze` prints on two versions of Python.

`python .ci/pin.py OLD NEW`: OLD is from Python 3.11, NEW from a newer one.
"""

import sys
from pathlib import Path

_HEAD = "# The versions that the Makefile and CI install. To renew: CONTRIBUTING.md."
_MARKERS = ('python_version < "3.12"', 'python_version >= "3.12"')


def main(old: str, new: str) -> None:
    """Prints one line for a version that both have, else one line for each."""
    before, after = (set(Path(name).read_text().split()) for name in (old, new))
    lines = [
        *(before & after),
        *(f"{each}; {_MARKERS[0]}" for each in before - after),
        *(f"{each}; {_MARKERS[1]}" for each in after - before),
    ]
    print(_HEAD, *sorted(lines, key=str.lower), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
