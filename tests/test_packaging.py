"""What a source distribution holds, and what an installed package says of itself."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_source_distribution_has_all_that_a_build_needs(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    folders = ("csrc", "kernels", "montessori", "docs")
    wanted = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    assert wanted <= held, sorted(wanted - held)
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= held
    assert not any(name.endswith(".so") for name in held)


@pytest.mark.parametrize("required", [True, False])
def test_a_build_without_torch_fails_where_kernels_are_asked_for(required, monkeypatch, tmp_path):
    monkeypatch.setenv("MONTESSORI_REQUIRE_KERNELS", "1" if required else "")
    code = (
        "import runpy, sys; sys.modules['torch'] = None\n"
        f"sys.argv = ['setup.py', '-q', 'egg_info', '--egg-base', {str(tmp_path)!r}]; runpy.run_path('setup.py')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert "torch is not installed here" in done.stderr
    assert (done.returncode != 0) == required == ("--no-build-isolation" in done.stderr), done.stderr
