"""Points from Triton Model Analyzer's and perf_analyzer's CSV."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstack_sched.adapters.profile_import import read_csv
from dstack_sched.domain.profile import ProfilePoint
from dstack_sched.errors import InputError

# Layouts of Model Analyzer's metrics-model-inference.csv and of perf_analyzer -f, as those tools write them.
MODEL_ANALYZER = """\
Model,Batch,Concurrency,Model Config Path,Instance Group,Preferred Batch Sizes,Satisfies Constraints,\
Throughput (infer/sec),p99 Latency (ms),RAM Usage (MB)
resnet50_libtorch,1,2,resnet50_libtorch_i0,1/GPU,[32],Yes,195.0,11.0,2897.0
resnet50_libtorch,1,1,resnet50_libtorch_i0,1/GPU,[32],Yes,164.0,8.1,2937.0
resnet50_libtorch,8,1,resnet50_libtorch_i0,1/GPU,[32],Yes,560.0,16.5,2937.0
resnet50_libtorch,8,1,resnet50_libtorch_i1,2/GPU,[32],Yes,570.0,15.5,2937.0
other,1,1,other_i0,1/GPU,[32],Yes,10.0,99.0,1.0
"""
PERF_ANALYZER = """\
Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,\
Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency
1,720.5,10,180,20,15,1100,12,3,1340,1400,1450,1600
2,1100.0,10,180,900,15,1100,12,3,2300,2400,2450,2600
"""


@pytest.fixture
def write(tmp_path: Path):
    def save(text: str, name: str = "in.csv") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return save


def test_model_analyzer(write) -> None:
    found = read_csv(write(MODEL_ANALYZER), "resnet50_libtorch")
    assert found.points == (ProfilePoint(100, 1, 8.1, 8.1, 1), ProfilePoint(100, 8, 15.5, 15.5, 1))
    assert found.skipped == 1, "two clients at once measure the queue"


def test_model_analyzer_with_an_average(write) -> None:
    text = "Model,Batch,Concurrency,Avg Latency (ms),p99 Latency (ms)\nm,4,1,6.5,8.0\n"
    assert read_csv(write(text), "m", 40).points == (ProfilePoint(40, 4, 6.5, 8.0, 1),)


def test_perf_analyzer(write) -> None:
    found = read_csv(write(PERF_ANALYZER), "any", gpu_percent=50, batch_size=4)
    assert found.points == (ProfilePoint(50, 4, 1.34, 1.6, 1),)
    assert found.skipped == 1


def test_perf_analyzer_by_request_rate_counts_only_without_a_queue(write) -> None:
    text = PERF_ANALYZER.replace("Concurrency", "Request Rate")
    assert read_csv(write(text), "any").skipped == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "holds no rows"),
        ("a,b\n1,2\n", "neither Model Analyzer's"),
        (
            MODEL_ANALYZER.replace("resnet50_libtorch,", "x,"),
            "no rows of 'resnet50_libtorch'; it has other, x",
        ),
        (MODEL_ANALYZER.replace("8.1", "fast"), "row 3: column 'p99 Latency (ms)' holds 'fast'"),
        (MODEL_ANALYZER.replace("8.1", "nan"), "row 3: column 'p99 Latency (ms)' is nan"),
        (MODEL_ANALYZER.replace("8.1", "-8.1"), "it must be above 0"),
        (PERF_ANALYZER.replace("1340", ""), "row 2: column 'p50 latency' holds ''"),
        (PERF_ANALYZER.replace("\n1,", "\n3,"), "requests queued in every row"),
    ],
)
def test_a_bad_file_is_one_line(write, text: str, wanted: str) -> None:
    with pytest.raises(InputError) as caught:
        read_csv(write(text), "resnet50_libtorch")
    assert wanted in str(caught.value)
    assert "in.csv" in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_csv(tmp_path / "none.csv", "m")
