"""Weight files: every format gives the arrays that were written, and nothing in a file is run."""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxunlearn.models import read_arrays

# --- what torch.save writes, without PyTorch -----------------------------------------------------


class Name:
    """A name in a pickle; called never, callable for the sake of the pickler."""

    def __init__(self, module, name):
        self.text = f"{module}\n{name}\n"

    def __call__(self):
        raise AssertionError(self.text)


class Call:
    """The result of calling what a name stands for."""

    def __init__(self, module, name, *args):
        self.parts = Name(module, name), args

    def __reduce__(self):
        return self.parts


class Storage(NamedTuple):
    key: str
    kind: str
    length: int
    view: Any = None


class Pickler(pickle._Pickler):  # the one in Python can be told how to write names
    dispatch = pickle._Pickler.dispatch.copy()

    def save_name(self, name):
        self.write(pickle.GLOBAL + name.text.encode())
        self.memoize(name)

    dispatch[Name] = save_name

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        return ("storage", Name("torch", value.kind), value.key, "cuda:0", value.length, value.view)


def write_pickle(stream, content):
    Pickler(stream, protocol=2).dump(content)


def write_zip(path, content, storages, order="little"):
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("net/data.pkl", "w") as stream:
            write_pickle(stream, content)
        archive.writestr("net/byteorder", order)
        for key, numbers in storages.items():
            swapped = numbers.byteswap() if order == "big" else numbers
            archive.writestr(f"net/data/{key}", swapped.tobytes())


def write_legacy(path, content, storages):
    with path.open("wb") as stream:
        machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
        for part in (0x1950A86A20F9469CFC6C, 1001, machine, content, list(storages)):
            write_pickle(stream, part)
        for numbers in storages.values():
            stream.write(struct.pack("<q", numbers.size) + numbers.tobytes())


WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy], ids=["zip", "legacy"])


def tensor(storage, shape, strides, offset=0):
    rest = (False, OrderedDict())
    return Call("torch._utils", "_rebuild_tensor_v2", storage, offset, shape, strides, *rest)


BASE = np.arange(24, dtype=np.float32)
WHOLE = Storage("0", "FloatStorage", 24)
ONE = {"0": BASE}


def fc(name="fc.weight"):
    """A dictionary of one tensor; and what it holds."""
    return OrderedDict({name: tensor(WHOLE, (4, 6), (6, 1))}), {"0": BASE}


def same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name, strict=True)


# --- PyTorch -------------------------------------------------------------------------------------


@WRITERS
def test_tensors_come_back_whatever_their_strides_and_types(write, tmp_path):
    kinds = {"Double": "f8", "Half": "f2", "BFloat16": "bfloat16", "Long": "i8", "Bool": "?"}
    types = {key: np.array([0, 1, 3], dtype) for key, dtype in kinds.items()}
    content = OrderedDict(
        whole=tensor(WHOLE, (4, 6), (6, 1)),
        transposed=tensor(WHOLE, (6, 4), (1, 6)),
        part=tensor(WHOLE, (2, 3), (6, 1), offset=8),
        number=tensor(WHOLE, (), (), offset=7),
        empty=tensor(WHOLE, (0, 3), (3, 1)),
        old=Call("torch._utils", "_rebuild_tensor", WHOLE, 0, (3,), (8,)),
        parameter=Call(
            "torch._utils", "_rebuild_parameter", tensor(WHOLE, (2,), (1,)), True, OrderedDict()
        ),
        sized=tensor(WHOLE, Call("torch", "Size", (3,)), (1,)),
    )
    content |= {key: tensor(Storage(key, f"{key}Storage", 3), (3,), (1,)) for key in kinds}
    write(tmp_path / "net.pth", content, ONE | types)
    square = BASE.reshape(4, 6)
    expected = {
        "whole": square,
        "transposed": square.T,
        "part": square[1:3, 2:5],
        "number": square[1, 1][()],
        "empty": np.zeros((0, 3), np.float32),
        "old": BASE[::8],
        "parameter": BASE[:2],
        "sized": BASE[:3],
    }
    expected = {name: np.asarray(array) for name, array in expected.items()} | types
    expected |= {key: expected[key].astype(np.float32) for key in ("Half", "BFloat16")}
    same(read_arrays(tmp_path / "net.pth"), expected)


def test_types_without_a_storage_of_their_own_are_kept_in_bytes(tmp_path):
    numbers = np.array([1, 2, 3], np.uint16)
    rest = (False, OrderedDict(), Name("torch", "uint16"))
    storage = Storage("0", "UntypedStorage", 6)
    content = {"ids": Call("torch._utils", "_rebuild_tensor_v3", storage, 0, (3,), (1,), *rest)}
    write_zip(tmp_path / "net.pt", content, {"0": numbers})
    same(read_arrays(tmp_path / "net.pt"), {"ids": numbers})


def test_numbers_of_a_big_endian_machine_are_turned_round(tmp_path):
    write_zip(tmp_path / "net.pt", *fc(), order="big")
    same(read_arrays(tmp_path / "net.pt"), {"fc.weight": BASE.reshape(4, 6)})


def test_a_view_in_the_older_format_is_a_part_of_its_storage(tmp_path):
    content = {"part": tensor(WHOLE._replace(view=("v", 4, 10)), (3,), (2,), offset=1)}
    write_legacy(tmp_path / "net.th", content, ONE)
    same(read_arrays(tmp_path / "net.th"), {"part": BASE[5:10:2]})


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda net: net, "module."),
        (lambda net: net, "_orig_mod.module."),
        (
            lambda net: {"state_dict": net, "best_prec1": 91.78, "epoch": 3, "arch": "net"},
            "module.",
        ),
        (lambda net: {"net": net, "best": tensor(WHOLE, (), ())}, ""),
        (lambda net: {"weights": net, "optimizer": {"state": {0: {"step": 1}}}}, ""),
        (lambda net: {"model": net, "ema": dict(net)}, ""),
    ],
    ids=["parallel", "compiled", "state_dict", "scalar_tensor", "optimizer", "average"],
)
def test_checkpoints_are_unwrapped_and_wrappers_leave_the_names(wrap, prefix, tmp_path):
    net, storages = fc(f"{prefix}fc.weight")
    write_zip(tmp_path / "net.pth", wrap(net), storages)
    same(read_arrays(tmp_path / "net.pth"), {"fc.weight": BASE.reshape(4, 6)})


def test_a_prefix_of_some_names_only_stays(tmp_path):
    np.savez(tmp_path / "net.npz", **{"module.a": BASE, "b": BASE})
    assert read_arrays(tmp_path / "net.npz").keys() == {"module.a", "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": dict(fc()[0]), "b": dict(fc()[0])}, "several dictionaries of tensors: a, b"),
        ({"epoch": 3}, "holds no dictionary of tensors"),
        ([1, 2], "holds a list, no dictionary"),
        ({"w": tensor(WHOLE, (25,), (1,))}, r"shape \(25,\) exceeds its storage of 24 numbers"),
        ({"w": tensor(WHOLE, (4,), (1,), offset=21)}, "exceeds its storage"),
        ({"w": tensor(WHOLE, (4,), (-1,), offset=3)}, "exceeds its storage"),
        ({"w": tensor(WHOLE, (10**12,), (0,))}, "exceeds its storage"),
        ({"w": tensor(WHOLE, (4,), (1, 1))}, "zip"),
        (
            Call("__main__", "Net"),
            r"names __main__.Net, which .* not loaded; .*safetens",
        ),
        (Call("torch.nn.modules.linear", "Linear"), "names torch.nn.modules.linear.Linear"),
        ({"lr": Call("numpy.core.multiarray", "scalar")}, "names numpy.core.multiarray.scalar"),
    ],
)
def test_files_without_one_dictionary_of_sound_tensors_are_refused(content, message, tmp_path):
    write_zip(tmp_path / "net.pth", content, ONE)
    with pytest.raises(ValueError, match=rf"net.pth cannot be read as PyTorch .*{message}"):
        read_arrays(tmp_path / "net.pth")


class MakesAFolder:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_what_a_pickle_wants_called_is_not_called(tmp_path):
    path, folder = tmp_path / "net.pth", tmp_path / "made"
    pickle.loads(pickle.dumps(MakesAFolder(folder)))  # this is what it would do
    folder.rmdir()
    for write in (write_zip, write_legacy):
        write(path, {"state_dict": fc()[0], "extra": MakesAFolder(folder)}, ONE)
        with pytest.raises(ValueError, match=r"names posix.mkdir, which .* not loaded; write"):
            read_arrays(path)
    path.write_bytes(pickle.dumps(MakesAFolder(folder)))
    with pytest.raises(ValueError, match=r"it names posix.mkdir"):
        read_arrays(path)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage"])
def test_a_pickle_cannot_change_what_its_names_stand_for(name, tmp_path):
    # The opcodes of setattr(NAME, "x", 1).
    path = tmp_path / "net.pth"
    path.write_bytes(b"\x80\x02c" + name.encode() + b"\n(N}X\x01\x00\x00\x00xK\x01stb.")
    with pytest.raises(ValueError, match=r"as PyTorch weights: .*(attribute|state)"):
        read_arrays(path)


@WRITERS
def test_torn_pytorch_files_are_refused(write, tmp_path):
    path = tmp_path / "net.pt"
    write(path, *fc())
    whole = path.read_bytes()
    for end in range(0, len(whole), 29):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"net.pt cannot be read as PyTorch weights: .+;"):
            read_arrays(path)


def test_other_files_under_a_name_of_pytorch_are_refused(tmp_path):
    path = tmp_path / "net.pth"
    np.savez(tmp_path / "net.npz", weight=BASE)
    for content, message in (
        (b"<html>404</html>", "begins neither as a zip archive nor as a pickle"),
        ((tmp_path / "net.npz").read_bytes(), "a zip archive without a data.pkl"),
        (pickle.dumps({"weight": [1.0]}, protocol=2), "none that torch.save wrote"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_arrays(path)


# --- safetensors and npz -------------------------------------------------------------------------


def test_safetensors_come_back_and_half_precision_is_widened(tmp_path):
    arrays = {"a": BASE.reshape(4, 6), "ids": np.arange(3), "none": np.zeros((0, 2), np.float32)}
    half = {kind: np.array([1.0, -2.5], kind) for kind in ("float16", "bfloat16")}
    named = {f"module.{name}": array for name, array in (arrays | half).items()}
    save_file(named, tmp_path / "net.safetensors")
    expected = arrays | {kind: array.astype(np.float32) for kind, array in half.items()}
    same(read_arrays(tmp_path / "net.safetensors"), expected)


def test_torn_safetensors_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"a": BASE}, path)
    whole = path.read_bytes()
    for content in (b"", b"no header", whole[:40], whole[:-3]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"net.safetensors is torn or is no .safetensors file"):
            read_arrays(path)


def test_arrays_of_npz_come_back_as_stored(tmp_path):
    np.savez(tmp_path / "net.npz", weight=np.arange(6).reshape(2, 3))
    same(read_arrays(tmp_path / "net.npz"), {"weight": np.array([[0, 1, 2], [3, 4, 5]])})


def test_torn_npz_and_python_objects_are_refused(tmp_path):
    path = tmp_path / "net.npz"
    np.savez(path, weight=np.arange(1000))
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[:1000], whole[:500] + b"?" + whole[501:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"net.npz is torn or is no .npz of plain numbers"):
            read_arrays(path)
    np.savez(path, weight=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"plain numbers.*allow_pickle"):
        read_arrays(path)


def test_other_suffixes_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"ends in '.onnx'; weights are read from .npz, .safetens"):
        read_arrays(tmp_path / "net.onnx")


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pth", "h5", "keras"])
def test_a_file_that_is_not_there_is_said_to_be_missing(suffix, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"none.{suffix}"):
        read_arrays(tmp_path / f"none.{suffix}")


# --- Keras ---------------------------------------------------------------------------------------

KERAS = {
    "conv2d/kernel": np.arange(18, dtype=np.float32).reshape(3, 3, 1, 2),
    "conv2d/bias": np.ones(2, np.float32),
    "norm/gamma": np.full(2, 2, np.float32),
    "norm/beta": np.full(2, 3, np.float32),
    "norm/moving_mean": np.full(2, 4, np.float32),
    "norm/moving_variance": np.full(2, 5, np.float32),
    "sub/dense/kernel": np.ones((2, 3), np.float32),
}
NAMED = {  # as Keras 2 has them, and Keras 3 in .h5: by layer, then by the weight's own name
    "conv2d/conv2d/kernel:0": "conv2d/kernel",
    "conv2d/model/conv2d/bias:0": "conv2d/bias",
    "norm/norm/gamma": "norm/gamma",
    "norm/norm/beta": "norm/beta",
    "norm/norm/moving_mean": "norm/moving_mean",
    "norm/norm/moving_variance": "norm/moving_variance",
    "sub/model/sub/dense/kernel": "sub/dense/kernel",
}
NUMBERED = {  # as Keras 3 has them: by kind of layer; the names are attributes
    "layers/conv2d/vars/0": "conv2d/kernel",
    "layers/conv2d/vars/1": "conv2d/bias",
    "layers/batch_normalization/vars/0": "norm/gamma",
    "layers/batch_normalization/vars/1": "norm/beta",
    "layers/batch_normalization/vars/2": "norm/moving_mean",
    "layers/batch_normalization/vars/3": "norm/moving_variance",
    "layers/sequential/layers/dense/vars/0": "sub/dense/kernel",
}
LAYERS = {"batch_normalization": "norm", "sequential": "sub"}


def write_named(path, root=""):
    with h5py.File(path, "w") as file:
        for place, name in NAMED.items():
            file[f"{root}{place}"] = KERAS[name]
        file["optimizer_weights/adam/conv2d/m:0"] = BASE


def write_numbered(path):
    with h5py.File(path, "w") as file:
        for place, name in NUMBERED.items():
            file[place] = KERAS[name]
        for layer, name in LAYERS.items():
            file.require_group(f"layers/{layer}/vars").attrs["name"] = name
        file["layers/dropout/seed_generator/vars/0"] = np.arange(2)
        file["optimizer/vars/0"] = BASE


def write_archive(path):
    write_numbered(path.with_suffix(".h5"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_suffix(".h5"), "model.weights.h5")
        archive.writestr("config.json", "{}")


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_named, "net.h5"),
        (lambda path: write_named(path, root="model_weights/"), "whole.hdf5"),
        (write_numbered, "net.weights.h5"),
        (write_archive, "net.keras"),
    ],
    ids=["weights", "model", "keras3", "archive"],
)
def test_keras_weights_have_the_names_of_their_layers(write, name, tmp_path):
    write(tmp_path / name)
    same(read_arrays(tmp_path / name), KERAS)


def test_keras_keeps_bfloat16_as_bytes(tmp_path):
    numbers = np.array([[1.0, -2.5]], "bfloat16")
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file["dense/dense/kernel"] = numbers
    same(read_arrays(tmp_path / "net.h5"), {"dense/kernel": numbers.astype(np.float32)})


@pytest.mark.parametrize(
    ("layer", "shapes", "kinds"),
    [
        ("layer_normalization", [(4,), (4,)], ["gamma", "beta"]),
        ("query_dense", [(4, 2, 2), (2, 2)], ["kernel", "bias"]),
        ("batch_normalization", [(4,), (4,)], None),  # of which two?
        ("rescaling", [(1,)], None),
        ("gru_cell", [(3, 6), (2, 6), (2, 6)], None),
    ],
)
def test_numbered_weights_are_named_only_where_that_is_certain(layer, shapes, kinds, tmp_path):
    with h5py.File(tmp_path / "net.weights.h5", "w") as file:
        for number, shape in enumerate(shapes):
            file[f"layers/{layer}/vars/{number}"] = np.ones(shape, np.float32)
    if kinds:
        arrays = read_arrays(tmp_path / "net.weights.h5")
        assert {n: a.shape for n, a in arrays.items()} == {
            f"{layer}/{kind}": shape for kind, shape in zip(kinds, shapes, strict=True)
        }
    else:
        with pytest.raises(ValueError, match=rf"{layer} has weights of shapes .*model.save"):
            read_arrays(tmp_path / "net.weights.h5")


def test_torn_and_foreign_keras_files_are_refused(tmp_path):
    path = tmp_path / "net.h5"
    write_named(path)
    whole = path.read_bytes()
    for content in (b"", b"no hdf5", whole[:600], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as Keras weights: .*model.save"):
            read_arrays(path)
    with h5py.File(path, "w") as file:
        file.create_group("model_weights/dense")
    with pytest.raises(ValueError, match="without weights of layers"):
        read_arrays(path)
    (tmp_path / "net.keras").write_bytes(whole)
    with pytest.raises(ValueError, match=r"net.keras cannot be read as Keras weights: .*zip"):
        read_arrays(tmp_path / "net.keras")


def test_numbers_that_lie_in_another_file_are_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(16))
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file.create_dataset("a/a/bias", (4,), "f4", external=[(str(secret), 0, 16)])
    with pytest.raises(ValueError, match="a/a/bias lies in another file"):
        read_arrays(tmp_path / "net.h5")


# --- files of others -----------------------------------------------------------------------------


def test_files_of_others_hold_what_their_npz_copies_hold(shared_data):
    originals = [
        file
        for file in sorted((shared_data / "weights").iterdir())
        if file.suffix in (".th", ".pth", ".h5")
    ]
    assert {file.suffix for file in originals} == {".th", ".pth", ".h5"}
    for file in originals:
        same(read_arrays(file), read_arrays(file.with_suffix(".npz")))
