"""The page for authors of stores says what is so: its store passes the suite, run as the page says."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "write-a-store.md"
FILE = re.compile(r"```python\n# (?P<name>\S+\.py)\n(?P<text>.*?)```", re.DOTALL)


def test_the_documented_store_passes_the_suite(tmp_path: Path) -> None:
    files = list(FILE.finditer(PAGE.read_text()))
    for file in files:
        (tmp_path / file["name"]).write_text(file["text"])
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:valkey", "-p", "no:faker", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert [file["name"] for file in files] == ["shelf.py", "test_shelf.py"]
    assert "passed" in run.stdout
