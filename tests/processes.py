"""Python in a process of its own: for what a fresh interpreter must do, and for Inductor's plain C++ away from Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in `cwd`, with Inductor's caches there, and `env` added to the environment; AssertionError with its stderr when it fails."""
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "TORCH_LOGS")}
    kept["TORCHINDUCTOR_CACHE_DIR"] = str(cwd / "inductor_cache")
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=kept | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def python_json(code: str, cwd: Path, **env: str) -> Any:
    """The same; what the last line of its output says, as JSON."""
    return json.loads(python(code, cwd, **env).stdout.splitlines()[-1])
