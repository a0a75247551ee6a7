"""The two kinds of files that hold named arrays: NumPy's .npz, and .safetensors."""

import collections
import contextlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from train.system import text
from train.system.files import write_atomically
from train.weights.errors import WeightsError
from train.weights.tensors import Tensor, zeros

_BUCKET = "https://storage.googleapis.com/vit_models"
# How Google's files are called (vit_jax/configs and README.md of
# github.com/google-research/vision_transformer), and the folders that they are in.
_GOOGLE = {
    r"ViT-[BLH]_(8|14|16|32)\.npz": "imagenet21k",
    r"ViT-[BLH]_(8|14|16|32)-224\.npz": "imagenet21k+imagenet2012",
    r"(Ti|S|B|L)_(8|16|32)-i(1k|21k|21k_30)-.+\.npz": "augreg",
}
# Bytes of the part of a .safetensors file that names the arrays: a thousandth of it, or
# less.
_LARGEST_HEADER = 10_000_000
_MOST_ARRAYS = 10_000
# Bytes that NumPy reads of an array's header.
_LARGEST_NPY_HEADER = 10_000
# Characters of a parser's reason that are shown.
_LONGEST = 300
# The names that .safetensors has for the types that NumPy knows, and for bfloat16.
_TYPES = {
    "BOOL": np.bool_,
    "BF16": jnp.bfloat16,
    "C64": np.dtype("complex64"),
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
# The array of a file that was read last, by its name.
_Last = dict[str, np.ndarray]

_FROM_SCRATCH = "--config.init_from= trains from scratch."


def read(path: Path) -> dict[str, Tensor]:
    """The arrays of a file by name, from its headers: no value is read yet.

    bfloat16, for which .npz has no name, is read from its two-byte void.

    Raises:
      WeightsError: there is no such file, or it is none that can be read. Reading the
        values of a tensor raises it, too.
    """
    with _readable(path):
        if not path.exists():
            raise WeightsError(_missing(path))
        if not path.is_file():
            raise WeightsError(f"{path} is no file. {_FROM_SCRATCH}")
        reader = _READERS.get(path.suffix)
        if reader is None:
            raise WeightsError(
                f"{path} has an unknown extension; known are {', '.join(_READERS)}."
            )
        return reader(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns whatever a parser raises into the error of a file that is damaged."""
    try:
        yield
    except WeightsError:
        raise
    except (
        Exception
    ) as error:  # of many types: NumPy's, zipfile's, safetensors', JSON's
        reason = text.shown(f"{error}" or type(error).__name__)
        raise WeightsError(
            f"{path} cannot be read as {path.suffix}: {reason} If it is damaged, "
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


def _read_npz(path: Path) -> dict[str, Tensor]:
    # Not by `np.load`, which has no way to look at a header alone.
    with path.open("rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
            raise ValueError("It holds a single array without a name.")
    with zipfile.ZipFile(path) as archive:
        _check_names(archive.namelist())
        last: _Last = {}
        return dict(
            _npz_tensor(path, archive, info, last) for info in archive.infolist()
        )


def _npz_tensor(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, last: _Last
) -> tuple[str, Tensor]:
    name = info.filename.removesuffix(".npy")
    if name == info.filename:
        raise ValueError(f"{text.shown(name)} is no array.")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in _HEADERS:
            raise ValueError(f"{text.shown(name)} is of an unknown version, {version}.")
        size, parse = _HEADERS[version]
        length = member.read(size)
        header = member.read(min(int.from_bytes(length, "little"), _LARGEST_NPY_HEADER))
        shape, _, dtype = parse(io.BytesIO(length + header))
        _check_type(name, dtype)
        is_bfloat16 = dtype == np.dtype("V2")
        like = zeros(shape, jnp.bfloat16 if is_bfloat16 else dtype)
        if member.tell() + like.nbytes != info.file_size:
            raise ValueError(f"{text.shown(name)} is of another size than it says.")

    def values() -> np.ndarray:
        with (
            _readable(path),
            zipfile.ZipFile(path) as opened,
            opened.open(info) as member,
        ):
            array = np.lib.format.read_array(member, allow_pickle=False)
            return array.view(like.dtype) if is_bfloat16 else array

    return name, Tensor(name, like, _once(name, values, last))


# By version: how many bytes give the length of a header, and what reads both.
_HEADERS = {
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
}


def _check_type(name: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biufc" and dtype != np.dtype("V2"):
        raise ValueError(f"{text.shown(name)} holds {text.shown(dtype)}, not numbers.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _LARGEST_HEADER:
            raise ValueError(f"Its header has {size} bytes.")
        header = file.read(size)

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_names([name for name, _ in pairs])
        return dict(pairs)

    json.loads(header, object_pairs_hook=checked)
    with safetensors.safe_open(path, framework="np") as content:
        names = content.keys()
        last: _Last = {}
        return {name: _safe_tensor(path, content, name, last) for name in names}


def _safe_tensor(path: Path, content: Any, name: str, last: _Last) -> Tensor:
    entry = content.get_slice(name)
    dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
    if dtype not in _TYPES:
        raise ValueError(
            f"{text.shown(name)} is of type {dtype}; known are {', '.join(_TYPES)}."
        )

    def values() -> np.ndarray:
        with _readable(path), safetensors.safe_open(path, framework="np") as opened:
            return opened.get_tensor(name)

    return Tensor(name, zeros(shape, _TYPES[dtype]), _once(name, values, last))


def _once(
    name: str, values: Callable[[], np.ndarray], last: _Last
) -> Callable[[], np.ndarray]:
    """Reads once what is wanted several times in a row: the blocks of a stack."""

    def read() -> np.ndarray:
        if name not in last:
            last.clear()  # first: not two arrays are in memory
            last[name] = values()
        return last[name]

    return read


def _check_names(names: list[str]) -> None:
    """Refuses a name that is there twice, of which readers take one or the other.

    And more names than any model has.
    """
    if len(names) > _MOST_ARRAYS:
        raise ValueError(f"It has {len(names)} names, as no model does.")
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{text.shown(twice[0])} is in it more than once.")


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
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
