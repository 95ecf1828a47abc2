"""benchmarks.weights on small shapes: every scheme runs, is checked, and is compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import weights


@pytest.mark.parametrize("scheme", weights.SCHEMES)
def test_a_scheme_against_its_peers(scheme: str, tmp_path: Path) -> None:
    argv = ["--scheme", scheme, "--device", "cpu", "--shape", "3,32,256", "--shape", "1,64,128", "--out", str(tmp_path)]
    assert weights.main([*argv, "--peers", "ours,stock-eager"]) == 0
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert file.name.startswith("weights-")
    assert result["environment"]["command"].startswith(f"python -m benchmarks.weights --scheme {scheme} --device cpu --shape 3,32,256")
    rows = result["rows"]
    assert [(row["peer"], row["form"], row["status"]) for row in rows] == [("ours", scheme, "ok"), ("stock-eager", "float", "ok")] * 2
