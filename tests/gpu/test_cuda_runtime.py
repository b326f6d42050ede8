"""The CUDA runtime on a real device: answers of the CPU provider, in any order, at any level; nothing left
behind.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dstack_backend.cuda_driver import driver
from dstack_backend.cuda_slots import TIMED_EVERY
from dstack_backend.runtime import load_session
from dstack_backend.session import Session
from dstack_backend.tensors import DeviceArray
from fakes.feature_models import fixed, save
from fakes.networks import CHANNELS, SIDE, convolutional

pytestmark = pytest.mark.gpu

BATCH = 8
TOLERANCE = {"rtol": 2e-2, "atol": 2e-2}  # TF32 and other algorithms
SPARE_BYTES = 8 << 20  # what CUDA may keep of a load


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "network.onnx"
    save(convolutional(), path)
    return path


@pytest.fixture(scope="module")
def reference(path: Path) -> Session:
    return load_session(path, provider="cpu", gpu_percent=100)


def load(path: Path, sizes: Any = (1, 2, 4, 8), **options: Any) -> Session:
    session = load_session(path, provider="cuda", gpu_percent=100, **options)
    session.warm_up(sizes)
    return session


def images(rows: int, seed: int = 1) -> np.ndarray:
    return (
        np.random.default_rng([seed, rows])
        .standard_normal((rows, CHANNELS[0], SIDE, SIDE))
        .astype(np.float32)
    )


def check(got: Any, image: np.ndarray, reference: Session) -> None:
    for one, other in zip(got, reference.run({"image": image}), strict=True):
        np.testing.assert_allclose(one, other, **TOLERANCE)


def used_bytes() -> int:
    free, total = driver(0).memory_info()
    return total - free


@pytest.mark.parametrize(
    "options", [{}, {"conv_layout": "nhwc"}, {"conv_layout": "nchw"}, {"cuda_graphs": False}]
)
def test_every_batch_size_answers_as_the_cpu_does(path: Path, reference: Session, options: Any) -> None:
    session = load(path, **options)
    assert session.graphs == (0 if "cuda_graphs" in options else 4)
    for rows in (8, 1, 5, 3, 8, 2, 7, 11):
        for repeat in range(3):
            image = images(rows, repeat)
            check(session.run({"image": image}), image, reference)
    session.close()


def test_batches_launched_ahead_and_answered_out_of_order(path: Path, reference: Session) -> None:
    session = load(path)
    rng = np.random.default_rng(0)
    for turn in range(40):
        batches = [images(int(rows), turn) for rows in rng.integers(1, BATCH + 1, 3)]
        staged = [session.stage({"image": [image[:1], image[1:]]}) for image in batches]
        running = [session.launch(each) for each in staged]
        for index in rng.permutation(3):
            running[index].wait()
            check(running[index].outputs(), batches[index], reference)
            running[index].close()
    times = running[0].times_us
    assert set(times) == {"copy_in", "run", "copy_out"} and times["run"] > 0
    session.close()


def test_any_thread_may_serve(path: Path, reference: Session) -> None:
    session, turn, wrong = load(path), threading.Lock(), []

    def serve(seed: int) -> None:
        for rows in range(1, BATCH + 1):
            image = images(rows, seed)
            staged = session.stage({"image": image})
            with turn:
                running = session.launch(staged)
            running.wait()
            got = running.outputs()[0].copy()
            running.close()
            with turn:
                wanted = reference.run({"image": image})[0]
            if not np.allclose(got, wanted, **TOLERANCE):
                wrong.append((seed, rows))

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    session.close()


def test_tensors_on_the_device(path: Path, reference: Session) -> None:
    session, cuda, image = load(path), driver(0), images(5)
    pointer = cuda.allocate(image.nbytes)
    cuda.upload(pointer, image.ctypes.data, image.nbytes)
    there = DeviceArray(pointer, image.shape, image.dtype, 0)
    running = session.launch(
        session.stage({"image": [there[:2], image[2:3], there[3:]]}), device_outputs=["scores"]
    )
    running.wait()
    (scores,) = running.device_outputs()
    got = np.empty(scores.shape, scores.dtype)
    cuda.download(got.ctypes.data, scores.pointer, scores.nbytes)
    check([got], image, reference)
    running.close()
    cuda.free(pointer)
    session.close()


def test_shared_memory_is_read_by_the_device_itself(path: Path, reference: Session) -> None:
    """As Triton's stub maps it: registered once it has settled, right before and after."""
    session, rows = load(path), 64
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        image = images(rows)
        file.truncate(image.nbytes)
        shared = np.asarray(np.memmap(file.name, np.float32, "r+").reshape(image.shape))
        for turn in range(12):
            shared[:] = image = images(rows, turn)
            first = 5 * turn
            parts = [shared[first : first + 6], shared[2:3]]  # one of 72 KiB, and one that is gathered
            running = session.launch(session.stage({"image": parts}))
            check(running.outputs(), np.concatenate([image[first : first + 6], image[2:3]]), reference)
            running.close()
            time.sleep(0.05)
        assert session._host._registered  # type: ignore[attr-defined]
        session.close()


def test_a_model_of_fixed_shapes(tmp_path: Path) -> None:
    save(fixed(), tmp_path / "fixed.onnx")
    session = load(tmp_path / "fixed.onnx")
    wanted = load_session(tmp_path / "fixed.onnx", provider="cpu", gpu_percent=100)
    assert session.graphs == 1
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal((2, 16)).astype(np.float32)
        for one, other in zip(session.run({"x": x}), wanted.run({"x": x}), strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, **TOLERANCE)
    session.close()


def test_levels_answer_alike_and_a_wanted_mask_comes(path: Path, reference: Session) -> None:
    session = load(path, sizes=(1, BATCH), levels=(25.0, 50.0))
    assert session.levels == (25.0, 50.0, 100.0) and session.groups >= 8
    image = images(BATCH)
    for percent in (*session.levels, *reversed(session.levels)):
        running = session.launch(session.stage({"image": image}), gpu_percent=percent)
        running.wait()
        check(running.outputs(), image, reference)
        assert running.gpu_percent == percent
        running.close()
    wanted, deadline, got = 0b0110_0110, time.monotonic() + 30, 0
    while got != wanted and time.monotonic() < deadline:
        running = session.launch(session.stage({"image": image}), sm_groups=wanted)
        check(running.outputs(), image, reference)
        got = running.sm_groups
        running.close()
    assert got == wanted
    session.close()


def test_fewer_groups_take_longer(path: Path) -> None:
    """On a network that fills the device: a level that did nothing would show no difference."""
    session = load(path, sizes=(1024,), levels=(12.5,))
    image, run_us = images(1024), {}
    for percent in (100.0, 12.5):
        taken = []
        for _ in range(3 * TIMED_EVERY):
            running = session.launch(session.stage({"image": image}), gpu_percent=percent)
            running.outputs()
            taken.append(running.times_us["run"])
            running.close()
        run_us[percent] = min(taken[TIMED_EVERY:])  # those before show the times of the level before
    assert run_us[12.5] > 2 * run_us[100.0], run_us
    session.close()


@pytest.mark.parametrize("options", [{}, {"levels": (25.0, 50.0)}])
def test_loads_leave_nothing_behind(path: Path, options: Any) -> None:
    image = images(3)
    used = []
    for _ in range(6):
        session = load(path, **options)
        session.run({"image": image})
        session.close()
        used.append(used_bytes())
    assert used[-1] - used[1] <= SPARE_BYTES, [round(each / 2**20) for each in used]


def test_the_memory_limit_holds(path: Path, reference: Session) -> None:
    for _ in range(2):  # the first load of a process takes what cuDNN and cuBLAS keep
        free = load(path)
        taken = free.device_bytes
        free.close()
    session = load(path, memory_limit_bytes=taken // 2)
    assert 0 < session.graphs < 4
    image = images(BATCH)
    check(session.run({"image": image}), image, reference)
    session.close()


def test_the_second_load_shares_weights_from_the_cache(path: Path) -> None:
    loads = [load(path, sizes=(1, 8)) for _ in range(2)]
    assert all(session._sessions.shared_bytes for session in loads)  # type: ignore[attr-defined]
    for session in loads:
        session.close()
