"""The wheel: built offline, installed in a fresh environment, it answers outside the clone with the small model inside it."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from installed import needed

from llamacli.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the backend that pyproject.toml names, without a network."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True, timeout=300)
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`python(*args)` of an environment that has the wheel, and this environment's packages but not its llamacli."""
    home = tmp_path_factory.mktemp("outside")
    venv.create(home / "venv", symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home / "venv")}))
    zipfile.ZipFile(wheel).extractall(site)  # the installation of a pure Python wheel, without scripts
    folders = [path for path in sys.path if path.endswith("-packages")]
    (site / "dependencies.pth").write_text("\n".join(folders))  # come after the wheel, as `site` itself comes first

    def python(*args):
        env = {name: value for name, value in os.environ.items() if name not in ("LLAMACLI_MODEL", "PYTHONPATH")}
        return subprocess.run(
            [home / "venv" / "bin" / "python", *args],
            cwd=home,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=300,
        )

    return python


def test_the_wheel_holds_the_program_and_the_small_model_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if not re.match(r"[^/]*\.(dist-info|data)/", name)} == {
        "llamacli",
        "quantize",
    }
    models = [f"llamacli/models/scout-tiny/{name}.gguf" for name in ("mmproj-scout-tiny", "scout-tiny")]
    assert sorted(name for name in names if name.endswith(".gguf")) == models
    assert "llamacli/serve/page.html" in names


def test_the_wheel_brings_a_manual_page_of_every_command(wheel):
    pages = {name.partition("/share/man/man1/")[2] for name in zipfile.ZipFile(wheel).namelist() if ".data/data/" in name}
    assert pages == {"llamacli.1", *(f"llamacli-{command}.1" for command in COMMANDS)}


ASK = ("--temp", "0", "-n", "48", "What is the capital of France?")
NO_EXTRAS = """
import sys
sys.modules |= dict.fromkeys(("gguf", "safetensors", "matplotlib", "torch", "transformers"))  # None: cannot be imported
from llamacli.cli import main
sys.exit(main())
"""


def test_an_installed_wheel_has_the_command_and_its_own_modules(installed):
    code = "import importlib.metadata as m; print(*m.entry_points(name='llamacli')); import llamacli as p; print(p.__file__)"
    command, file = installed("-c", code).stdout.decode().splitlines()
    assert "llamacli.__main__:start" in command
    assert str(ROOT) not in file


def test_an_installed_wheel_answers_outside_the_clone_with_the_model_inside_it(installed):
    done = installed("-c", NO_EXTRAS, "run", "--json", *ASK)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "Paris" in json.loads(done.stdout)["text"]
    assert b"Paris" in installed("-m", "llamacli", "run", "-m", "scout-tiny", *ASK).stdout


def test_an_installed_wheel_converts_a_checkpoint_without_any_extra(installed):
    done = installed("-c", NO_EXTRAS, "quantize", ROOT / "models" / "scout-tiny" / "hf", "small.gguf", "--json")
    assert done.returncode == 0, done.stderr
    done = installed("-m", "llamacli", "run", "-m", "small.gguf", *ASK)
    assert b"Paris" in done.stdout, done.stderr


def test_tests_fail_without_a_package_that_dev_installs(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)  # as if it were not installed
    with pytest.raises(ImportError):
        needed("numpy")
    with pytest.raises(pytest.skip.Exception):
        needed("no_such_package")


def test_no_requirement_depends_on_the_version_of_a_kernel():
    """pip 24.1 to 25 fails on markers with `platform_release` where it is no version, as 6.8.0-51-generic is none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    assert every
    assert not [each for each in every if "platform_release" in each or "platform_version" in each]
