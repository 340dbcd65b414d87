"""What a newcomer meets first: the set-up says what is missing, and the release check what disagrees."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The few files that the scripts read."""
    for name in ("scripts/setup", "scripts/check_release.py", "src/retryproof/__init__.py", "CHANGELOG.md"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, target)
    return tmp_path


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


def python_that_fails(path: Path, case: str) -> Path:
    """A Python that exits with 1 where its program has this word, and works otherwise."""
    path.write_text(f'#!/bin/sh\ncase "$*" in *{case}*) exit 1;; *) exec {sys.executable} "$@";; esac\n')
    path.chmod(0o755)
    return path


def test_a_python_without_venv_is_answered_with_the_package_to_install(checkout: Path) -> None:
    python = python_that_fails(checkout / "python", "ensurepip")
    done = run(checkout / "scripts" / "setup", "demo", PYTHON=str(python))
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr


def test_an_old_python_is_answered_with_the_version_needed(checkout: Path) -> None:
    python = python_that_fails(checkout / "python", "version_info")
    done = run(checkout / "scripts" / "setup", "demo", PYTHON=str(python))
    assert done.returncode == 1
    assert "Python 3.11 or later is needed" in done.stderr


def test_the_changelog_has_the_packages_version_on_top(checkout: Path) -> None:
    done = run(sys.executable, checkout / "scripts" / "check_release.py")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_version_without_its_changelog_entry_is_found(checkout: Path) -> None:
    module = checkout / "src" / "retryproof" / "__init__.py"
    module.write_text('__version__ = "9.9.9"\n')
    done = run(sys.executable, checkout / "scripts" / "check_release.py")
    assert done.returncode == 1
    assert "the version is 9.9.9, but the changelog's newest entry is" in done.stdout
