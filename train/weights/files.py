"""The two kinds of files that hold named arrays: NumPy's .npz, and .safetensors."""

import collections
import json
import re
import reprlib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from train.files import write_atomically
from train.weights.errors import WeightsError

# What NumPy and its zip files raise for bytes that are no .npz file, and safetensors.
_DAMAGES = (
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    safetensors.SafetensorError,
)
_BUCKET = "https://storage.googleapis.com/vit_models"
# How Google's files are called (vit_jax/configs and README.md of
# github.com/google-research/vision_transformer), and the folders that they are in.
_GOOGLE = {
    r"ViT-[BLH]_(8|14|16|32)\.npz": "imagenet21k",
    r"ViT-[BLH]_(8|14|16|32)-224\.npz": "imagenet21k+imagenet2012",
    r"(Ti|S|B|L)_(8|16|32)-i(1k|21k|21k_30)-.+\.npz": "augreg",
}
# safetensors refuses larger ones.
_LARGEST_HEADER = 100_000_000
_FROM_SCRATCH = "--config.init_from= trains from scratch."


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name, none of them pickled.

    bfloat16, for which .npz has no name, is read from its two-byte void.

    Raises:
      WeightsError: there is no such file, or it is none that can be read.
    """
    if not path.exists():
        raise WeightsError(_missing(path))
    if not path.is_file():
        raise WeightsError(f"{path} is no file. {_FROM_SCRATCH}")
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise WeightsError(
            f"{path} has an unknown extension; known are {', '.join(_READERS)}."
        )
    try:
        return reader(path)
    except _DAMAGES as error:
        raise WeightsError(
            f"{path} cannot be read as {path.suffix}: {error} If it is damaged, "
            "fetch it again."
        ) from error


def save(
    path: str | Path, variables: Mapping[str, Any], metadata: dict[str, str]
) -> None:
    """Writes variables to a .safetensors file, whole or not at all.

    The name of an array is its path, joined by "/", such as "params/head/kernel". So

    ```
    arrays = safetensors.numpy.load_file(path)
    variables = flax.traverse_util.unflatten_dict(arrays, sep="/")
    ```

    is all that is needed to read them, without this program; an empty collection is
    then absent.

    Args:
      path: of the file. Its folder is made, in one that exists.
      variables: nested dicts of arrays, each written in its own dtype.
      metadata: what else to write to the file's header.

    Raises:
      WeightsError: the name does not end in ".safetensors", or nothing can be written.
    """
    path = Path(path)
    check_path(path)
    arrays = {
        # It is the memory as it lies there that safetensors writes.
        name: np.asarray(leaf, order="C")
        for name, leaf in traverse_util.flatten_dict(variables, sep="/").items()
    }
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, safetensors.numpy.save(arrays, metadata=metadata))
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error}") from error


def check_path(path: str | Path) -> None:
    """Checks the name of a file that is to be written.

    Raises:
      WeightsError: it does not end in ".safetensors".
    """
    if Path(path).suffix != ".safetensors":
        raise WeightsError(
            f"{path} must end in .safetensors, which is what it will be."
        )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # Given a path, NumPy leaves the file open where it is no zip file after all.
    with path.open("rb") as file:
        content = np.load(file, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise ValueError("It holds a single array without a name.")
        with content:
            _check_names(content.files)
            return {name: _array(name, content[name]) for name in content.files}


def _array(name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{name!r} is no array.")
    if value.dtype == np.dtype("V2"):
        return value.view(jnp.bfloat16)
    return value


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(min(size, _LARGEST_HEADER))

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_names([name for name, _ in pairs])
        return dict(pairs)

    json.loads(header, object_pairs_hook=checked)
    return safetensors.numpy.load_file(path)


def _check_names(names: list[str]) -> None:
    """Refuses a name that is there twice, of which readers take one or the other."""
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{reprlib.repr(twice[0])} is in it more than once.")


_READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}


def _missing(path: Path) -> str:
    for pattern, folder in _GOOGLE.items():
        if re.fullmatch(pattern, path.name):
            return (
                f"{path} does not exist. Google's file of that name is at "
                f"{_BUCKET}/{folder}/{path.name} : put it there. {_FROM_SCRATCH}"
            )
    return f"{path} does not exist. Name a file that does; {_FROM_SCRATCH}"
