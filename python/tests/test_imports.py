"""Packages that are missing, or of another version: named, with what to do. And what editors are told."""

import inspect
import pathlib
import shutil
import subprocess
import sys

import pytest

import kvmix
from kvmix import _native

FOLDER = pathlib.Path(kvmix.__file__).parent


def failure(program, *path):
    """The last line that another Python ends with."""
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}; {program}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_without_its_compiled_part(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "kvmix", ignore=shutil.ignore_patterns("_native*.so", "__pycache__"))
    said = failure("import kvmix", tmp_path)
    assert said.startswith("ImportError: kvmix: its compiled part cannot be loaded") and "pip" in said


def test_without_torch():
    said = failure("sys.modules['torch'] = None; import kvmix.transformers")
    assert said.startswith("ImportError: kvmix.transformers needs torch") and "kvmix[transformers]" in said


@pytest.mark.parametrize("version", ["4.57.1", "5.18.0", "5.40.0", "6.0.0"])
def test_with_another_transformers(version, tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(f"__version__ = '{version}'\n")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    said = failure("import kvmix.transformers", tmp_path)
    assert said.startswith("ImportError: kvmix.transformers works with transformers 5.19 to 5.39") and version in said


def test_types_and_docstrings_come_with_it():
    assert (FOLDER / "py.typed").exists()
    stub = (FOLDER / "_native.pyi").read_text()
    for name, thing in inspect.getmembers(_native):
        if not name.startswith("_"):
            assert f"class {name}" in stub or f"def {name}" in stub, name
    for name in kvmix.__all__:
        thing = getattr(kvmix, name)
        if inspect.isclass(thing) or callable(thing):
            assert inspect.getdoc(thing), name
