"""What the tests of the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from benchmarks import common

CPU = torch.device("cpu")
ENVIRONMENT_FIELDS = {
    "date", "command", "python", "torch", "triton", "torchao", "timm", "transformers", "device", "threads", "commit", "dirty", "source_sha256",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tiny sizes need one thread, and more of them wait for each other on a busy machine, in every timed call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def only_result(out: Path) -> tuple[dict[str, Any], Path]:
    (path,) = out.glob("*.json")
    return common.read_json(path), path


def is_png(path: Path) -> bool:
    height, width = matplotlib.image.imread(path).shape[:2]
    return width > 600 and height > 200
