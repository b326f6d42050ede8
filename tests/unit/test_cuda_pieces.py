"""What the CUDA runtime stands on: DLPack capsules, the reader of ONNX files, the cache, levels, the
driver's ABI.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_backend import cuda_driver, dlpack
from dstack_backend.cuda_groups import SmGroups
from dstack_backend.cuda_levels import Levels
from dstack_backend.cuda_sessions import agree
from dstack_backend.cuda_shelf import distance
from dstack_backend.errors import DeviceError, DeviceLostError, ModelError, RequestError
from dstack_backend.onnx_file import external_files, external_weights, operators
from dstack_backend.optimized import CACHE_VARIABLE, Cache, cache_directory, key_of
from dstack_backend.tensors import DeviceArray
from fakes import feature_models as made

# DLPack


class Capsule:
    """What np.from_dlpack wants: an object that makes a capsule."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CPU, 0

    def __dlpack__(self, **_: Any) -> Any:
        array = self.array
        return dlpack.capsule(
            array.ctypes.data, array.shape, dlpack.type_code(array.dtype), self.__dlpack_device__()
        )


@pytest.mark.parametrize("kind", ["bool", "u1", "i1", "u2", "i2", "f2", "i4", "u4", "f4", "i8", "u8", "f8"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 2)])
def test_numpy_and_onnxruntime_read_our_capsules(kind: str, shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape).astype(kind)
    got = np.from_dlpack(Capsule(array))  # type: ignore[arg-type]
    assert got.dtype == array.dtype and np.array_equal(got, array)
    assert not array.size or np.shares_memory(got, array)
    value = ort.OrtValue.from_dlpack(Capsule(array).__dlpack__())
    assert value.numpy().dtype == array.dtype and np.array_equal(value.numpy(), array)
    del got, value
    gc.collect()


def test_device_arrays_go_there_and_back() -> None:
    array = DeviceArray(4096, (4, 3), np.dtype(np.float16), 1)
    taken = dlpack.to_capsule(array)
    got = dlpack.from_capsule(taken)
    assert (got.pointer, got.shape, got.dtype, got.device_id) == (4096, (4, 3), np.float16, 1)
    with pytest.raises(RequestError, match="used already"):
        dlpack.from_capsule(taken)
    part = got[1:3]
    assert (part.pointer, part.shape, part.nbytes, len(part), part.ndim) == (4096 + 6, (2, 3), 12, 2, 2)
    assert part.owner is got.owner
    with pytest.raises(ValueError, match="one behind the other"):
        got[::2]


@pytest.mark.parametrize(
    ("kind", "device", "words"),
    [
        ((2, 32), (dlpack.CPU, 0), "device type 1; CUDA memory is wanted"),
        (dlpack.BFLOAT16, (dlpack.CUDA, 0), "DLPack type 4 with 16 bits"),
        ((0, 4), (dlpack.CUDA, 0), "type 0 with 4 bits"),
    ],
)
def test_capsules_that_cannot_be_served(kind: Any, device: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        dlpack.from_capsule(dlpack.capsule(4096, (2, 2), kind, device))


@pytest.mark.parametrize(("strides", "dense"), [((3, 1), True), ((1, 2), False), ((6, 1), False)])
def test_only_dense_tensors_are_taken(strides: tuple[int, int], dense: bool) -> None:
    taken = dlpack.capsule(4096, (2, 3), (2, 32))
    managed = dlpack._Managed.from_address(dlpack._capsule_pointer(taken, b"dltensor"))
    values = (ctypes.c_int64 * 2)(*strides)
    managed.strides = ctypes.cast(values, ctypes.POINTER(ctypes.c_int64))
    if dense:
        assert dlpack.from_capsule(taken).shape == (2, 3)
    else:
        with pytest.raises(RequestError, match="gaps between its elements"):
            dlpack.from_capsule(taken)


# ONNX files


def test_external_weights_are_where_onnx_says(tmp_path: Path) -> None:
    proto = made.dense()
    made.save(proto, tmp_path / "m.onnx", external="w.bin")
    weights = {each.name: each for each in external_weights(tmp_path / "m.onnx")}
    assert set(weights) == {"a", "b"}
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            weight = weights[tensor.name]
            data = (tmp_path / weight.file).read_bytes()[weight.offset : weight.offset + weight.size_bytes]
            whole = onnx.load(str(tmp_path / "m.onnx"))
            (wanted,) = [each.raw_data for each in whole.graph.initializer if each.name == tensor.name]
            assert data == wanted and weight.kind == (2, 32) and weight.shape == tuple(tensor.dims)
    assert external_files(tmp_path / "m.onnx") == (tmp_path / "w.bin",)


def test_a_model_with_its_weights_inside_has_none_outside(tmp_path: Path) -> None:
    made.save(made.every_type(), tmp_path / "m.onnx")
    assert external_weights(tmp_path / "m.onnx") == ()
    assert operators(tmp_path / "m.onnx") == {"Gather"}


@given(data=st.binary(max_size=200))
def test_rubbish_is_refused_in_one_way(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "rubbish.onnx"
    path.write_bytes(data)
    try:
        external_weights(path)
    except ModelError as error:
        assert str(path) in str(error)


@given(cut=st.integers(min_value=1, max_value=400), flip=st.integers(min_value=0, max_value=400))
def test_damaged_models_are_refused_in_one_way(
    cut: int, flip: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        made.save(made.dense(), folder / "m.onnx", external="w.bin")
    data = bytearray((folder / "m.onnx").read_bytes())
    data[flip % len(data)] ^= 0x5A
    (folder / "cut.onnx").write_bytes(data[: len(data) - cut % len(data)])
    try:
        external_weights(folder / "cut.onnx")
    except ModelError as error:
        assert "cut.onnx" in str(error)


# The cache


def write(entry: Path, text: str = "model") -> None:
    (entry / "model.onnx").write_text(text)
    (entry / "weights.bin").write_bytes(b"x" * 100)


def text_of(entry: Path) -> str:
    return (entry / "model.onnx").read_text()


def never(entry: Path) -> None:
    raise AssertionError("made again")


def test_an_entry_is_made_once_and_is_private(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    entry = cache.get("k", write, 10)
    assert text_of(entry) == "model"
    assert cache.get("k", never, 10) == entry
    assert (tmp_path / "cache" / "optimized").stat().st_mode & 0o777 == 0o700


def test_what_could_not_be_made_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")

    def fail(entry: Path) -> None:
        write(entry)
        raise ModelError("no")

    with pytest.raises(ModelError, match="no"):
        cache.get("k", fail, 10)
    assert list((tmp_path / "cache" / "optimized").iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "gone", "sums"])
def test_entries_that_are_not_whole_are_made_again(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path / "cache")
    entry = cache.get("k", write, 10)
    if damage == "cut":
        (entry / "weights.bin").write_bytes(b"x" * 99)
    elif damage == "gone":
        (entry / "weights.bin").unlink()
    else:
        (entry / "sums.json").write_text("[1]")
    assert text_of(cache.get("k", lambda made: write(made, "new"), 10)) == "new"


def test_the_longest_unused_entries_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=600)
    for index, key in enumerate("abc"):
        os.utime(cache.get(key, write, 120), (index, index))
    cache.get("a", never, 120)
    cache.get("d", write, 300)
    assert sorted(each.name for each in (tmp_path / "cache" / "optimized").iterdir()) == ["a", "d"]


def test_the_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(OSError, match=rf"nearly full; set {CACHE_VARIABLE}"):
        Cache(tmp_path / "cache").get("k", write, 10)


def test_a_directory_where_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "optimized").mkdir()
    (tmp_path / "optimized").chmod(0o777)
    with pytest.raises(DeviceError, match="others can write there"):
        Cache(tmp_path).get("k", write, 10)


def test_several_processes_may_make_the_same_entry(tmp_path: Path) -> None:
    """One stays; the others find it whole."""
    cache, meet, found = Cache(tmp_path / "cache"), threading.Barrier(3), []

    def make(entry: Path) -> None:
        write(entry)
        meet.wait(10)

    threads = [threading.Thread(target=lambda: found.append(cache.get("k", make, 10))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert [text_of(each) for each in found] == ["model"] * 3
    assert [each.name for each in (tmp_path / "cache" / "optimized").iterdir()] == ["k"]


def test_keys_tell_models_and_traits_apart(tmp_path: Path) -> None:
    made.save(made.dense(), tmp_path / "a" / "m.onnx", external="w.bin")
    made.save(made.dense(), tmp_path / "b" / "m.onnx", external="w.bin")
    first = key_of(tmp_path / "a" / "m.onnx", ["x"])
    assert key_of(tmp_path / "b" / "m.onnx", ["x"]) == first
    assert key_of(tmp_path / "a" / "m.onnx", ["y"]) != first
    data = bytearray((tmp_path / "b" / "w.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "b" / "w.bin").write_bytes(data)
    assert key_of(tmp_path / "b" / "m.onnx", ["x"]) != first


def test_where_the_cache_is(tmp_path: Path) -> None:
    assert cache_directory({CACHE_VARIABLE: "/c", "HOME": "/h"}) == Path("/c")
    assert cache_directory({"XDG_CACHE_HOME": "/x", "HOME": "/h"}) == Path("/x/dstack")
    assert cache_directory({"HOME": "/h"}) == Path("/h/.cache/dstack")


# Levels


@given(
    groups=st.integers(2, 40),
    percent=st.floats(0.5, 100),
    levels=st.lists(st.floats(0.5, 100), max_size=5),
    seed=st.text(max_size=5),
)
def test_every_level_has_an_aligned_home_of_its_size(
    groups: int, percent: float, levels: list[float], seed: str
) -> None:
    found = Levels(groups, percent, levels, seed)
    assert list(found.percents) == sorted(set(found.percents))
    assert found.homes[0] == found.mask() and len(found.homes) == len(found.percents)
    for level in (percent, *levels):
        mask = found.mask(level)
        count = mask.bit_count()
        assert count == min(groups, max(1, round(level / 100 * groups)))
        assert 0 < mask < 1 << groups
        start = (mask & -mask).bit_length() - 1
        assert mask >> start == (1 << count) - 1 and start % count == 0
        assert found.percent(mask) in found.percents


def test_a_fixed_share_has_no_levels() -> None:
    fixed = Levels(0, 40, (), "m")
    assert (fixed.percents, fixed.homes, fixed.mask(20)) == ((), [0], 0)


def test_models_spread_over_the_groups() -> None:
    homes = {Levels(16, 25, (), f"/models/{name}").mask() for name in range(40)}
    assert homes == {0xF, 0xF0, 0xF00, 0xF000}


def test_the_nearest_groups() -> None:
    have = [0b1111, 0b110000, 0b11000000, 0b11]
    assert min(have, key=lambda each: distance(each, 0b11100000)) == 0b11000000
    assert min(have, key=lambda each: distance(each, 0b10)) == 0b11


# Answers


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ([1, 2.001], True),
        ([1, 2.2], False),
        ([1, np.nan], False),
        ([[1, 2]], False),
    ],
)
def test_agreement(other: Any, same: bool) -> None:
    assert agree(np.array([1, 2], np.float32), np.array(other, np.float32)) is same
    assert not agree(np.array([1, 2]), np.array([1, 3]))
    assert agree(np.array([1, np.inf]), np.array([1, np.inf]))


# The driver


class FakeLibrary:
    """libcuda of an H100, as far as contexts and SM groups go. calls: names, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.status: dict[str, int] = {}
        self._functions: list[Any] = []
        self.descriptions: list[list[int]] = []
        self.destroyed = 0
        self.missing = ""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"in the driver's words"
                return 0
            if name == "cuGetProcAddress_v2" and arguments[0].decode() != self.missing:
                self._resolve(arguments[0].decode(), arguments[1]._obj)
            return self.status.get(name, 0)

        return call

    def _resolve(self, symbol: str, into: Any) -> None:
        address = ctypes.c_void_p
        signatures: dict[str, tuple[Any, Any]] = {
            "cuDeviceGetDevResource": ((ctypes.c_int, address, ctypes.c_int), self._resource),
            "cuDevSmResourceSplitByCount": ((address,) * 4 + (ctypes.c_uint,) * 2, self._split),
            "cuDevResourceGenerateDesc": ((address, address, ctypes.c_uint), self._describe),
            "cuGreenCtxCreate": ((address, address, ctypes.c_int, ctypes.c_uint), lambda *_: 0),
            "cuGreenCtxDestroy": ((address,), self._destroy),
            "cuGreenCtxStreamCreate": ((address, address, ctypes.c_uint, ctypes.c_int), lambda *_: 0),
        }
        arguments, function = signatures[symbol]
        callback = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(function)
        self._functions.append(callback)
        into.value = ctypes.cast(callback, address).value

    @staticmethod
    def _sms(at: int, value: int | None = None) -> int:
        field = ctypes.c_uint32.from_address(at + 96)
        if value is not None:
            field.value = value
        return field.value

    def _resource(self, device: int, resource: int, kind: int) -> int:
        self._sms(resource, 132)
        return 0

    def _split(self, groups: int, count: int, whole: int, rest: int, flags: int, sms: int) -> int:
        assert (self._sms(whole), sms) == (132, 8)
        for index in range(15):
            self._sms(groups + 144 * index, 8)
        ctypes.c_uint.from_address(count).value = 15
        self._sms(rest, 12)
        return 0

    def _destroy(self, context: int) -> int:
        self.destroyed += 1
        return 0

    def _describe(self, description: int, resources: int, count: int) -> int:
        self.descriptions.append([self._sms(resources + 144 * index) for index in range(count)])
        return 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    library = FakeLibrary()
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(cuda_driver.ctypes, "PyDLL", lambda _: library)
    return library


def test_shares_of_an_h100(library: FakeLibrary) -> None:
    groups = SmGroups(cuda_driver.Driver(0))
    assert groups.sms == (8,) * 15 + (12,)
    for _ in range(3):  # a green context cannot be given back: it is made once
        groups.stream(0b1000_0000_0000_0110)
    groups.stream(0b1)
    assert library.descriptions == [[8, 8, 12], [8]]
    groups._end()
    groups._end()
    assert library.destroyed == 2


@pytest.mark.parametrize(
    ("status", "kind"), [(2, DeviceError), (700, DeviceLostError), (805, DeviceLostError)]
)
def test_what_ends_a_process_is_told_apart(library: FakeLibrary, status: int, kind: type) -> None:
    driver = cuda_driver.Driver(0)
    library.status["cuMemFree_v2"] = status
    with pytest.raises(kind, match=rf"cuMemFree_v2: in the driver's words \({status}\)"):
        driver.free(1)
    driver.check()
    library.status["cuStreamQuery"] = 600  # not ready: work is under way
    driver.check()
    library.status["cuStreamQuery"] = 719
    with pytest.raises(DeviceLostError):
        driver.check()


def test_a_driver_without_green_contexts_names_the_mend(library: FakeLibrary) -> None:
    library.missing = "cuGreenCtxStreamCreate"
    with pytest.raises(
        DeviceError, match=r"no cuGreenCtxStreamCreate: take a newer one, or set levels to off"
    ):
        SmGroups(cuda_driver.Driver(0))


def test_no_driver_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", missing)
    with pytest.raises(DeviceError, match=r"no CUDA driver: libcuda.* use a CPU instance"):
        cuda_driver.Driver(0)
