"""What we hand to perf_analyzer and what we read back."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from dstack_sched.adapters.perf_analyzer import example_request, kept_bytes_of, parse_export, why
from dstack_sched.cli.bench import parse_data, parse_shapes
from dstack_sched.errors import InputError, MachineError


def request(sent_ns: int, *answered_ns: int) -> dict[str, object]:
    return {"timestamp": sent_ns, "request_inputs": {"x": None}, "response_timestamps": list(answered_ns)}


def test_export_in_order_of_sending_with_latency_to_the_last_response(tmp_path: Path) -> None:
    file = tmp_path / "export.json"
    requests = [request(2_000_000_000, 2_010_000_000), request(1_000_000_000, 1_001_000_000, 1_005_500_000)]
    lost = request(3_000_000_000)
    file.write_text(json.dumps({"experiments": [{"requests": [*requests, lost]}]}))
    trace = parse_export(file)
    assert trace.sent_s.tolist() == [1.0, 2.0]
    assert trace.latency_ms.tolist() == [5.5, 10.0]
    assert trace.error is None


@pytest.mark.parametrize("text", ["", "{}", '{"experiments": [{}]}', '{"experiments": 3}', "[1"])
def test_another_format_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "export.json"
    file.write_text(text)
    with pytest.raises(MachineError, match="not a perf_analyzer profile export"):
        parse_export(file)
    with pytest.raises(MachineError, match="not a perf_analyzer profile export"):
        parse_export(tmp_path / "none.json")


def test_an_export_without_requests_is_an_empty_trace(tmp_path: Path) -> None:
    file = tmp_path / "export.json"
    file.write_text('{"experiments": [{"requests": []}]}')
    assert parse_export(file).sent_s.size == 0


def test_the_server_s_own_words_are_the_reason(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.write_text(
        "*** Measurement Settings ***\nWARNING: data type\n Failed\nThread [2] had error: out of memory\n\n"
    )
    assert (why(output, 99).error, why(output, 99).request_failed) == ("out of memory", True)
    output.write_text("error: failed to get model metadata: unknown model\n")
    cut = why(output, 1)
    assert not cut.request_failed
    assert (
        cut.error == "perf_analyzer ended with status 1: error: failed to get model metadata: unknown model"
    )
    output.write_text("WARNING: x\n")
    assert why(output, 134).error == "perf_analyzer ended with status 134: no output"


def config(max_batch_size: int, **inputs: tuple[str, list[int]]) -> dict[str, object]:
    declared = [{"name": n, "data_type": t, "dims": d, "optional": False} for n, (t, d) in inputs.items()]
    return {"name": "m", "max_batch_size": max_batch_size, "input": declared}


def test_inputs_have_the_declared_shape_without_the_batch() -> None:
    made = example_request(config(8, x=("TYPE_FP32", [3, 4, 4]), ids=("TYPE_INT64", [7])), {})
    assert made["x"]["shape"] == [3, 4, 4] and made["ids"]["shape"] == [7]
    values = np.frombuffer(base64.b64decode(made["x"]["b64"]), np.float32)
    assert values.size == 48 and np.isfinite(values).all()
    ids = np.frombuffer(base64.b64decode(made["ids"]["b64"]), np.int64)
    assert ids.min() >= 0 and ids.max() < 1000, "token ids that any vocabulary has"


def test_dynamic_dimensions_get_usual_sizes_or_those_given() -> None:
    images = config(8, x=("TYPE_FP32", [3, -1, -1]))
    assert example_request(images, {})["x"]["shape"] == [3, 224, 224]
    assert example_request(images, {"x": (3, 64, 32)})["x"]["shape"] == [3, 64, 32]
    with pytest.raises(InputError, match="m: input 'x' has 3 dimensions beside the batch, not 1"):
        example_request(images, {"x": (5,)})
    with pytest.raises(InputError, match="no input is named 'y'"):
        example_request(images, {"y": (5,)})


def test_models_without_a_batch_and_strings() -> None:
    made = example_request(config(0, s=("TYPE_STRING", [2]), state=("TYPE_FP16", [2, 1, 4])), {})
    assert made["s"] == {"content": ["text", "text"], "shape": [2]}
    assert made["state"]["shape"] == [2, 1, 4]
    assert len(base64.b64decode(made["state"]["b64"])) == 16


def test_a_type_that_cannot_be_made_up_asks_for_data() -> None:
    with pytest.raises(InputError, match="cannot make up TYPE_BF16 data; give --input-data"):
        example_request(config(1, x=("TYPE_BF16", [1])), {})


def test_shape_option() -> None:
    assert parse_shapes(["m/x:3,224,224", "m/a/b:c:7"]) == {"m": {"x": (3, 224, 224), "a/b:c": (7,)}}
    for bad in ("m", "m/x", "m/x:", "m/x:3,", "m/x:a", "/x:1", "m/:1", "m/x:-1"):
        with pytest.raises(InputError, match="expected MODEL/INPUT:DIMS"):
            parse_shapes([bad])


def test_data_option(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.touch()
    assert parse_data([f"m={file}"]) == {"m": file}
    for bad in ("m", f"={file}", "m=", f"m={file}.not"):
        with pytest.raises(InputError, match="expected MODEL=FILE"):
            parse_data([bad])


def test_strings_are_kept_as_they_are() -> None:
    assert kept_bytes_of({"x": {"content": ["ab", "c"], "shape": [2]}}, numbers=True) == 9


@pytest.mark.parametrize(("numbers", "kept"), [(False, 3 * 150528), (True, 23 * 150528)])
def test_images_are_kept_in_copies_and_later_as_numbers(numbers: bool, kept: int) -> None:
    declared = {"name": "x", "data_type": "TYPE_UINT8", "dims": [3, 224, 224]}
    request = example_request({"name": "m", "max_batch_size": 8, "input": [declared]}, {})
    assert kept_bytes_of(request, numbers=numbers) == kept
