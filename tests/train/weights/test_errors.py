"""Files of weights that do not fit, are damaged, or ask for much."""

import io
import json
import pickle
import tracemalloc
import warnings
import zipfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from tests.train.weights import tiny_weights as tiny
from train import weights


class ErrorTest(tiny.TestCase):
    @parameterized.parameters(
        ("ViT-B_16.npz", "imagenet21k/ViT-B_16.npz"),
        ("ViT-H_14.npz", "imagenet21k/ViT-H_14.npz"),
        ("ViT-L_16-224.npz", "imagenet21k+imagenet2012/ViT-L_16-224.npz"),
        (
            "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz",
            "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz",
        ),
    )
    def test_missing_file_of_googles_is_told_where_it_is(self, name, place):
        path = self.folder / name
        message = self.message(path, {})
        self.assertIn(f"{path} does not exist", message)
        self.assertIn(f" https://storage.googleapis.com/vit_models/{place} ", message)
        self.assertIn("--config.init_from= trains from scratch", message)

    @parameterized.parameters("mine.npz", "a/b.safetensors", "ViT-B_16.safetensors")
    def test_any_other_missing_file_is_told_alone(self, name):
        message = self.message(self.folder / name, {})
        self.assertIn(f"{name} does not exist", message)
        self.assertIn("--config.init_from= trains from scratch", message)
        self.assertNotIn("https:", message)

    def test_folder_is_no_file(self):
        self.assertIn("is no file", self.message(self.folder, {}))

    def test_extension_must_be_known(self):
        path = self.folder / "file.pth"
        path.write_bytes(b"weights")
        message = self.message(path, {})
        self.assertIn("file.pth has an unknown extension; known are .npz,", message)

    @parameterized.product(
        extension=[".npz", ".safetensors"], content=[b"", b"abc", b"\x80" * 100]
    )
    def test_file_of_something_else_is_damaged(self, extension, content):
        path = self.folder / f"file{extension}"
        path.write_bytes(content)
        message = self.message(path, {})
        self.assertIn(f"{path} cannot be read as {extension}: ", message)

    @parameterized.parameters(".npz", ".safetensors")
    def test_file_with_an_end_missing_is_damaged(self, extension):
        path = self.write(tiny.google(), f"file{extension}")
        content = path.read_bytes()
        for length in (len(content) - 1, len(content) // 2, 50):
            path.write_bytes(content[:length])
            self.assertIn("cannot be read", self.message(path, tiny.specs(tiny.vit())))

    def test_file_with_a_wrong_byte_is_damaged(self):
        arrays = tiny.google()
        path = self.write(arrays)
        content = bytearray(path.read_bytes())
        content[content.index(arrays["embedding/kernel"].tobytes())] ^= 1
        path.write_bytes(content)
        self.assertIn("cannot be read", self.message(path, tiny.specs(tiny.vit())))

    def test_nothing_is_unpickled(self):
        path = self.folder / "file.npz"
        np.savez(path, cls=np.asarray([None], dtype=object))
        self.assertIn("cls holds object", self.message(path, tiny.specs(tiny.vit())))

    def test_array_without_a_name_is_no_file_of_weights(self):
        path = self.folder / "file.npz"
        with path.open("wb") as file:
            np.save(file, np.ones(3))
        self.assertIn("a single array", self.message(path, tiny.specs(tiny.vit())))

    @parameterized.parameters(
        ({"blocks.0.attn.qkv.weight": np.ones(3), "a": np.ones(3)}, "a, blocks.0"),
        ({}, "none"),
    )
    def test_unknown_layout_names_what_is_there(self, arrays, names):
        for extension in (".npz", ".safetensors"):
            path = self.write(arrays, f"file{extension}")
            message = self.message(path, tiny.specs(tiny.vit()))
            self.assertIn(f"{path}: the layout is unknown", message)
            self.assertIn(f"The first names are: {names}", message)

    def test_array_that_is_there_twice_is_an_error(self):
        variables = tiny.random_variables(tiny.vit(scan=True))
        twice = tiny.flat(variables) | tiny.flat(tiny.random_variables(tiny.vit()))
        path = self.write(twice, "file.safetensors")
        self.assertIn("are the same", self.message(path, tiny.specs(tiny.vit())))

    @parameterized.parameters((np.int32, np.float32), (np.float32, np.int32))
    def test_integers_and_floats_are_not_converted_to_each_other(self, saved, wanted):
        path = self.folder / "file.safetensors"
        count = {"batch_stats": {"count": np.ones(3, saved)}}
        weights.save(path, count, {})
        self.assert_equal(weights.load(path, count), count)
        variables = {"batch_stats": {"count": np.ones(3, wanted)}}
        names = (np.dtype(saved).name, np.dtype(wanted).name)
        self.assertIn(
            "batch_stats/count: {} in the file, {} in the model".format(*names),
            self.message(path, variables),
        )

    @parameterized.parameters(
        (np.nan, "float32"),
        (-np.inf, "float16"),
        (1e39, "float64"),
        (-1e300, "float64"),
    )
    def test_values_that_are_not_finite_are_named(self, value, dtype):
        path = self.folder / "file.safetensors"
        kernel = np.ones((2, 3), dtype)
        kernel[1, 1] = value
        weights.save(path, {"params": {"kernel": kernel, "bias": np.ones(3)}}, {})
        specs = {"params": {"kernel": np.ones((2, 3), "f4"), "bias": np.ones(3, "f4")}}
        message = self.message(path, specs)
        self.assertIn("1 arrays have values that are infinite or NaN", message)
        self.assertIn("params/kernel: 1 of 6 values", message)

    @parameterized.parameters("int32", "complex64", "bool")
    def test_positions_of_another_type_are_not_interpolated(self, dtype):
        variables = tiny.random_variables(tiny.vit())
        flat = tiny.flat(variables)
        (name,) = (name for name in flat if "pos_embed" in name or "positions" in name)
        flat[name] = np.ones((1, 50, flat[name].shape[-1]), dtype)
        path = self.write(flat, "file.safetensors")
        message = self.message(path, tiny.specs(tiny.vit()))
        self.assertIn(f"{dtype} in the file, float32 in the model", message)

    def test_names_that_are_there_twice_are_refused(self):
        npz = self.folder / "file.npz"
        np.savez(npz, **tiny.flat(tiny.random_variables(tiny.vit())))
        with zipfile.ZipFile(npz, "a") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.writestr(file.namelist()[0], file.read(file.namelist()[0]))
        entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
        header = f"{{{entry},{entry}}}".encode()
        twice = self.folder / "file.safetensors"
        twice.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        for path, part in (
            (npz, "is in it more than once"),
            (twice, "a is in it more than once"),
        ):
            message = self.message(path, tiny.specs(tiny.vit()))
            self.assertIn(part, message)
            self.assertIn(str(path), message)

    def test_file_of_another_model_lists_what_does_not_fit(self):
        path = self.folder / "file.safetensors"
        weights.save(path, tiny.random_variables(tiny.resnet()), {})
        message = self.message(path, tiny.specs(tiny.vit()))
        count = len(
            set(tiny.flat(tiny.random_variables(tiny.resnet())))
            ^ set(tiny.flat(tiny.specs(tiny.vit())))
        )
        # The head is one of another width.
        self.assertIn(f"{path}: {count} arrays do not fit", message)
        self.assertLen(message.splitlines(), 12)
        self.assertIn(f"... and {count - 10} more", message)

    def test_every_shape_that_does_not_fit_is_listed(self):
        message = self.message(
            self.write(tiny.google()), tiny.specs(tiny.vit(patch_size=2), 8)
        )
        self.assertIn("1 arrays do not fit", message)
        self.assertIn(
            "embedding/kernel (params/embedding/kernel): (4, 4, 3, 16) in the file, "
            "(2, 2, 3, 16) in the model",
            message,
        )

    def test_model_with_a_class_token_takes_no_file_without(self):
        path = self.folder / "file.safetensors"
        weights.save(path, tiny.random_variables(tiny.vit(pool="gap")), {})
        message = self.message(path, tiny.specs(tiny.vit()))
        self.assertIn("params/cls (1, 1, 16): in the model alone", message)
        self.assertIn("(1, 16, 16) in the file, (1, 17, 16) in the model", message)


def _safetensors(entries, content=b""):
    """A file with any header; of names and their (dtype, shape, end of the data)."""
    header = entries
    if not isinstance(entries, bytes):
        header = json.dumps(
            {
                name: {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
                for name, (dtype, shape, end) in entries.items()
            }
        ).encode()
    return len(header).to_bytes(8, "little") + header + content


def _npy(header, content=b""):
    """An array of a .npz file with any header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + content


def _npz(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def _header(shape="(3,)", descr="'<f4'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


_STACK = "params/Transformer/encoderblock/LayerNorm_0/scale"
_LONG = f"vit.encoder.layer.{'1' * 5000}.layernorm_before.weight"
_HOSTILE = {
    "a stack of a billion": (
        lambda: _safetensors({_STACK: ("F32", [10**9, 0], 0)}),
        "(1000000000, 0): in the file alone",
    ),
    "a shape without its bytes": (
        lambda: _npz(embedding=_npy(_header(shape=f"({2**40},)"))),
        "is of another size than it says",
    ),
    "a shape beyond all memory": (
        lambda: _npz(embedding=_npy(_header(shape=f"({2**40}, {2**40})"))),
        "cannot be read as .npz",
    ),
    "a bomb that the model does not have": (
        lambda: _npz(
            **{"params/bomb": _npy(_header(shape=f"({2**24},)"), bytes(4 * 2**24))}
        ),
        "params/bomb (16777216,): in the file alone",
    ),
    "positions of a bomb": (
        lambda: _npz(
            **{
                f"params/{tiny.POS_EMBEDDING}": _npy(
                    _header(shape=f"(1, {1 + 2**20}, 16)"), bytes(2**26 + 64)
                )
            }
        ),
        "(1, 1048577, 16) in the file",
    ),
    "eight bits": (
        lambda: _safetensors({"params/a": ("F8_E4M3", [2], 2)}, bytes(2)),
        "params/a is of type F8_E4M3; known are",
    ),
    "text": (lambda: _npz(a=_npy(_header(descr="'<U3'"), bytes(36))), "a holds <U3"),
    "a structure": (
        lambda: _npz(a=_npy(_header(descr="[('x', '<f4')]"), bytes(12))),
        "a holds [('x', '<f4')], not numbers",
    ),
    "a number of 5,000 digits": (
        lambda: _safetensors({_LONG: ("F32", [1], 4)}, bytes(4)),
        "1111 ... 1111",
    ),
    "parentheses": (lambda: _npz(a=_npy("(" * 9000)), "cannot be read as .npz"),
    "a header of half a gigabyte": (
        lambda: _npz(
            a=b"\x93NUMPY\x02\x00"
            + (2**26).to_bytes(4, "little")
            + _header().encode().ljust(2**26)
        ),
        "cannot be read as .npz",
    ),
    "brackets": (lambda: _safetensors(b"[" * 9000), "cannot be read as .safetensors"),
    "a header of a terabyte": (
        lambda: (2**40).to_bytes(8, "little") + b"{}",
        "Its header has 1099511627776 bytes",
    ),
    "a pickle": (lambda: pickle.dumps([1, 2, 3]), "File is not a zip file"),
    "no array": (lambda: _npz(a=b"text"), "cannot be read as .npz"),
    "signs for the terminal": (
        lambda: _safetensors({"params/\x1b[31m\n": ("F32", [1], 4)}, bytes(4)),
        "params/\\x1b[31m\\n (1,): in the file alone",
    ),
    "a name of a megabyte": (
        lambda: _safetensors({"params/" + "a" * 10**6: ("F32", [1], 4)}, bytes(4)),
        "aaa ... aaa",
    ),
    "twenty thousand names": (
        lambda: _safetensors({f"params/{n}": ("F32", [0], 0) for n in range(20_000)}),
        "It has 20000 names, as no model does",
    ),
}


class HostileTest(tiny.TestCase):
    """Files that are small, or that pack well, and ask for much."""

    @parameterized.named_parameters((name, name) for name in _HOSTILE)
    def test_is_refused_from_its_header_in_few_words(self, name):
        content, part = _HOSTILE[name]
        data = content()
        is_zip = data[:2] == b"PK" or name == "a pickle"
        path = self.folder / ("file.npz" if is_zip else "file.safetensors")
        path.write_bytes(data)
        specs = tiny.specs(tiny.vit())
        tracemalloc.start()
        message = self.message(path, specs)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertIn(part, message)
        self.assertIn(str(path), message)
        self.assertLess(len(message), 2500)
        self.assertLess(peak, 20 * 2**20)

    def test_a_value_is_read_when_all_fits(self):
        """Of a file with one array too many, none is read."""
        path = self.write(tiny.google() | {"Transformer/more": np.ones(3)})
        with mock.patch.object(np.lib.format, "read_array") as read:
            message = self.message(path, tiny.specs(tiny.vit()))
        self.assertIn("Transformer/more", message)
        read.assert_not_called()

    def test_a_stack_is_read_once(self):
        variables = tiny.random_variables(tiny.vit(scan=True))
        path = self.write(tiny.flat(variables), "file.npz")
        whole = np.lib.format.read_array
        with mock.patch.object(np.lib.format, "read_array", side_effect=whole) as read:
            weights.load(path, tiny.specs(tiny.vit()))
        self.assertEqual(read.call_count, len(tiny.flat(variables)))


if __name__ == "__main__":
    absltest.main()
