"""The built wheel, installed into a clean environment, runs every command: nothing depends on the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (path,) = folder.glob("lmkit-*.whl")
    return path


def test_the_wheel_holds_the_package_and_every_preset_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    presets = {
        f"lmkit/configs/{p.relative_to(ROOT / 'configs').as_posix()}" for p in (ROOT / "configs").rglob("*.yaml")
    }
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lmkit").rglob("*.py")}
    assert presets | modules <= names
    data = {"lmkit/py.typed", "lmkit/evaluation/published.csv"}
    assert not [n for n in names - presets - modules - data if ".dist-info/" not in n]


@pytest.mark.skipif(os.name == "nt", reason="the environment below borrows its libraries in the POSIX layout")
def test_every_command_works_from_the_wheel_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """The environment has the wheel installed and borrows only the libraries, not lmkit, from this one."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]  # to make one in the environment takes seconds
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    libraries = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text("\n".join(dict.fromkeys(libraries)) + "\n", encoding="utf-8")
    where = "import lmkit, pathlib; print(pathlib.Path(lmkit.__file__).resolve())"
    found = subprocess.run([python, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(site.resolve()))
    program = tmp_path / "env" / "bin" / "lmkit"
    subprocess.run([python, ROOT / "scripts" / "smoke.py", program], cwd=tmp_path, check=True)
