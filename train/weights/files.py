"""Files of named arrays: reads NumPy's .npz and .safetensors, writes the latter."""

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
from train.weights.tensors import LazyArray, zeros

_BUCKET = "https://storage.googleapis.com/vit_models"
# Patterns of the names of Google's files, and the folders of the files, from
# vit_jax/configs and README.md of github.com/google-research/vision_transformer.
_GOOGLE = {
    r"ViT-[BLH]_(8|14|16|32)\.npz": "imagenet21k",
    r"ViT-[BLH]_(8|14|16|32)-224\.npz": "imagenet21k+imagenet2012",
    r"(Ti|S|B|L)_(8|16|32)-i(1k|21k|21k_30)-.+\.npz": "augreg",
}
# Bytes. The header of a .safetensors file, which names the arrays, is usually at most a
# thousandth of the file.
_LARGEST_HEADER = 10_000_000
_MOST_ARRAYS = 10_000
# Bytes: NumPy's own limit for the header of an array.
_LARGEST_NPY_HEADER = 10_000
# Characters shown of a parser's error message.
_LONGEST = 300
# dtypes by their names in .safetensors: NumPy's, and bfloat16.
_TYPES = {
    "BOOL": np.bool_,
    "BF16": jnp.bfloat16,
    "C64": np.dtype("complex64"),
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
# A cache of the one array that was read last from a file, by name.
_LastArray = dict[str, np.ndarray]

_FROM_SCRATCH = "--config.init_from= trains from scratch."


def read(path: Path) -> dict[str, LazyArray]:
    """Returns the arrays of a file by name, reading only its headers.

    .npz has no name for bfloat16; NumPy writes bfloat16 there as void of two bytes,
    which is read as bfloat16.

    Raises:
      WeightsError: the file is missing or cannot be read. Reading the values of a
        returned tensor raises it, too.
    """
    with _readable(path):
        if not path.exists():
            raise WeightsError(_missing_message(path))
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
    """Turns any error of a parser into a `WeightsError` of a damaged file."""
    try:
        yield
    except WeightsError:
        raise
    except (
        Exception
    ) as error:  # of many types: NumPy's, zipfile's, safetensors', JSON's
        reason = text.shorten(f"{error}" or type(error).__name__)
        raise WeightsError(
            f"{path} cannot be read as {path.suffix}: {reason} If it is damaged, "
            "fetch it again."
        ) from error


def save(
    path: str | Path, variables: Mapping[str, Any], metadata: dict[str, str]
) -> None:
    """Writes variables to a .safetensors file atomically.

    The name of an array is its path, joined by "/", such as "params/head/kernel". These
    lines read the file without this program, except that empty collections are lost:

    ```
    arrays = safetensors.numpy.load_file(path)
    variables = flax.traverse_util.unflatten_dict(arrays, sep="/")
    ```

    Args:
      path: path of the file. Its folder is created if the folder's parent exists.
      variables: nested dicts of arrays, each written in its own dtype.
      metadata: texts for the file's header, by name.

    Raises:
      WeightsError: the name does not end in ".safetensors", or the file cannot be
        written.
    """
    path = Path(path)
    check_path(path)
    arrays = {
        # safetensors writes the memory of an array as it is, without its strides.
        name: np.asarray(leaf, order="C")
        for name, leaf in traverse_util.flatten_dict(variables, sep="/").items()
    }
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, safetensors.numpy.save(arrays, metadata=metadata))
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error}") from error


def check_path(path: str | Path) -> None:
    """Checks the name of a file to write.

    Raises:
      WeightsError: the name does not end in ".safetensors".
    """
    if Path(path).suffix != ".safetensors":
        raise WeightsError(
            f"{path} must end in .safetensors, which is what it will be."
        )


def _read_npz(path: Path) -> dict[str, LazyArray]:
    # Without `np.load`, which cannot read a header alone.
    with path.open("rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
            raise ValueError("It holds a single array without a name.")
    with zipfile.ZipFile(path) as archive:
        _check_names(archive.namelist())
        last: _LastArray = {}
        return dict(
            _npz_tensor(path, archive, info, last) for info in archive.infolist()
        )


def _npz_tensor(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, last: _LastArray
) -> tuple[str, LazyArray]:
    name = info.filename.removesuffix(".npy")
    if name == info.filename:
        raise ValueError(f"{text.shorten(name)} is no array.")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in _HEADERS:
            raise ValueError(
                f"{text.shorten(name)} is of an unknown version, {version}."
            )
        size, parse = _HEADERS[version]
        length = member.read(size)
        header = member.read(min(int.from_bytes(length, "little"), _LARGEST_NPY_HEADER))
        shape, _, dtype = parse(io.BytesIO(length + header))
        _check_type(name, dtype)
        is_bfloat16 = dtype == np.dtype("V2")
        like = zeros(shape, jnp.bfloat16 if is_bfloat16 else dtype)
        if member.tell() + like.nbytes != info.file_size:
            raise ValueError(f"{text.shorten(name)} is of another size than it says.")

    def values() -> np.ndarray:
        with (
            _readable(path),
            zipfile.ZipFile(path) as opened,
            opened.open(info) as member,
        ):
            array = np.lib.format.read_array(member, allow_pickle=False)
            return array.view(like.dtype) if is_bfloat16 else array

    return name, LazyArray(name, like, _caching_last(name, values, last))


# By version of .npy: bytes of the header's length field, and the parser of both.
_HEADERS = {
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
}


def _check_type(name: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biufc" and dtype != np.dtype("V2"):
        raise ValueError(
            f"{text.shorten(name)} holds {text.shorten(dtype)}, not numbers."
        )


def _read_safetensors(path: Path) -> dict[str, LazyArray]:
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
        last: _LastArray = {}
        return {name: _safetensors_tensor(path, content, name, last) for name in names}


def _safetensors_tensor(
    path: Path, content: Any, name: str, last: _LastArray
) -> LazyArray:
    entry = content.get_slice(name)
    dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
    if dtype not in _TYPES:
        raise ValueError(
            f"{text.shorten(name)} is of type {dtype}; known are {', '.join(_TYPES)}."
        )

    def values() -> np.ndarray:
        with _readable(path), safetensors.safe_open(path, framework="np") as opened:
            return opened.get_tensor(name)

    return LazyArray(
        name, zeros(shape, _TYPES[dtype]), _caching_last(name, values, last)
    )


def _caching_last(
    name: str, values: Callable[[], np.ndarray], last: _LastArray
) -> Callable[[], np.ndarray]:
    """Returns a reader of an array that reads the file only if `last` lacks the array.

    So a stacked array is read once if its blocks are taken one after another.

    Args:
      name: name of the array.
      values: reads the array from the file.
      last: the cache that all arrays of the file share.
    """

    def read() -> np.ndarray:
        if name not in last:
            last.clear()  # before reading: only one array is in memory
            last[name] = values()
        return last[name]

    return read


def _check_names(names: list[str]) -> None:
    """Raises `ValueError` for too many names, or a name that occurs twice.

    Readers differ in which of two arrays of the same name they take.
    """
    if len(names) > _MOST_ARRAYS:
        raise ValueError(f"It has {len(names)} names, as no model does.")
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{text.shorten(repeated[0])} is in it more than once.")


_READERS: dict[str, Callable[[Path], dict[str, LazyArray]]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}


def _missing_message(path: Path) -> str:
    for pattern, folder in _GOOGLE.items():
        if re.fullmatch(pattern, path.name):
            return (
                f"{path} does not exist. Google's file of that name is at "
                f"{_BUCKET}/{folder}/{path.name} : put it there. {_FROM_SCRATCH}"
            )
    return f"{path} does not exist. Name a file that does; {_FROM_SCRATCH}"
