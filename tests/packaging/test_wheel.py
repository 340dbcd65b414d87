"""What is published: the wheel holds every file of the package, and works where nothing else is installed."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SOURCE = PROJECT / "src"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=50, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", target)
    assert built.returncode == 0, built.stderr
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def bare_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and nothing else, not even pip."""
    place = tmp_path_factory.mktemp("bare") / "venv"
    made = run(sys.executable, "-m", "venv", "--without-pip", place)
    assert made.returncode == 0, made.stderr
    python = place / "bin" / "python"
    installed = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert installed.returncode == 0, installed.stderr
    return place


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    wanted = {
        str(file.relative_to(SOURCE))
        for file in (SOURCE / "retryproof").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted
    assert "retryproof/py.typed" in held


def test_the_wheel_has_no_hard_dependency(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    hard = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert hard == []
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_bare_wheel_is_importable_and_is_the_installed_one(bare_environment: Path) -> None:
    program = "import retryproof; print(retryproof.__file__)"
    done = run(bare_environment / "bin" / "python", "-I", "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(bare_environment))


def test_the_command_without_its_extra_says_what_to_install(bare_environment: Path) -> None:
    done = run(bare_environment / "bin" / "retryproof", "--help")
    assert done.returncode != 0
    assert "retryproof[cli]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("module", "extra"),
    [("client.httpx", "httpx"), ("observe.prometheus", "prometheus"), ("observe.opentelemetry", "opentelemetry")],
)
def test_a_module_without_its_extra_says_what_to_install(bare_environment: Path, module: str, extra: str) -> None:
    done = run(bare_environment / "bin" / "python", "-I", "-c", f"import retryproof.{module}")
    assert f"pip install 'retryproof[{extra}]'" in done.stderr.splitlines()[-1]
