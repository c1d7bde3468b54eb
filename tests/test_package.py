"""Built and installed as a user would get it: sdist -> wheel -> a folder far from the repository. No network."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist of the files that git tracks, and the wheel that is built from the unpacked sdist alone."""
    folder = tmp_path_factory.mktemp("package")
    tree, out = folder / "tree", folder / "dist"
    out.mkdir()
    tracked = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-c", BUILD, "build_sdist", str(out), cwd=tree)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    run(sys.executable, "-c", BUILD, "build_wheel", str(out), cwd=source)
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run(sys.executable, *command, "--target", str(target), str(built[1]), cwd=target)
    return target


def test_the_wheel_has_all_that_runs_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    for name in ("py.typed", "assets/report/template.html", "assets/data/facts_train.jsonl", "assets/data/README.md"):
        assert f"pgkd_peft/{name}" in names, name
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pgkd_peft").rglob("*.py")}
    recipes = {f"pgkd_peft/assets/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert len(modules) > 50
    assert len(recipes) > 3
    assert modules | recipes <= names
    assert not [name for name in names if not name.startswith(("pgkd_peft/", "pgkd_peft-"))]


def test_it_runs_outside_the_repository(installed, tmp_path):
    """Recipes are listed and copied, the demo explains itself, and its data come from the installed package."""
    pgkd = (sys.executable, "-m", "pgkd_peft")
    here = {"cwd": tmp_path, "PYTHONPATH": str(installed)}
    where = run(sys.executable, "-c", "import pgkd_peft; print(pgkd_peft.__file__)", **here)
    assert Path(where.strip()).is_relative_to(installed)
    assert "facts_cpu" in run(*pgkd, "recipes", **here)
    run(*pgkd, "recipes", "cp", "facts_cpu", **here)
    assert (tmp_path / "facts_cpu.yaml").read_text() == (ROOT / "recipes" / "facts_cpu.yaml").read_text()
    assert "--max_steps" in run(*pgkd, "demo", "--help", **here)
    for name, rows in (("facts", "72"), ("facts_heldout", "40")):
        count = f"from pgkd_peft.data.named import load_named; print(len(load_named('builtin:{name}')))"
        assert run(sys.executable, "-c", count, **here).strip() == rows


def test_the_command_is_installed(installed):
    assert (installed / "bin" / "pgkd").is_file()
    metadata = next(installed.glob("pgkd_peft-*.dist-info")) / "METADATA"
    assert "Provides-Extra: demo" in metadata.read_text(encoding="utf-8")
