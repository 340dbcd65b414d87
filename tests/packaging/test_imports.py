"""Which libraries each file may import: none in the core, and an optional one only in the file that bears its name."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "retryproof"

# Library -> the words, one of which has to stand in the importing file's path.
HOMES = {
    "asyncpg": {"asyncpg"},
    "click": {"cli"},
    "fastapi": {"fastapi", "demo"},
    "httpx": {"httpx", "demo"},
    "hypothesis": {"testing"},
    "aiosqlite": {"aiosqlite"},
    "django": {"django"},
    "greenlet": {"sqlalchemy"},
    "sqlalchemy": {"sqlalchemy"},
    "opentelemetry": {"opentelemetry"},
    "prometheus_client": {"prometheus"},
    "psycopg": {"psycopg"},
    "psycopg_pool": {"psycopg"},
    "pydantic": {"pydantic", "demo"},
    "pytest": {"testing"},
    "redis": {"redis"},
    "rich": {"cli", "demo"},
    "starlette": {"fastapi", "starlette", "demo"},
    "uvicorn": {"demo"},
}

EVERYBODYS = ["retryproof", "retryproof.stores", "retryproof.http", "retryproof.http.asgi"]


def imported_libraries(file: Path) -> Iterator[str]:
    """Top-level names of what a file imports from outside the standard library and this package."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), level=0):
                found = [module]
            case _:
                continue
        for name in found:
            top = name.partition(".")[0]
            if top != "retryproof" and top not in sys.stdlib_module_names:
                yield top


def test_an_optional_library_is_imported_only_where_its_name_is_in_the_path() -> None:
    strays = [
        f"{file.relative_to(SOURCE)} imports {library}"
        for file in sorted(SOURCE.rglob("*.py"))
        for library in imported_libraries(file)
        if not HOMES.get(library, set()) & set(file.relative_to(SOURCE).with_suffix("").parts)
    ]
    assert strays == []


def test_no_test_file_imports_another() -> None:
    """What two of them need stands in a file of its own; else one of them cannot be moved, or run twice."""
    tests = SOURCE.parents[1] / "tests"
    strays = [
        f"{file.relative_to(tests)} imports {node.module}"
        for file in sorted(tests.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and "test_" in (node.module or "")
    ]
    assert strays == []


def test_the_core_imports_nothing_but_the_standard_library_and_itself() -> None:
    strays = [
        f"{file.name} imports {name}"
        for file in sorted((SOURCE / "core").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom | ast.Import)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.partition(".")[0] not in sys.stdlib_module_names and not name.startswith("retryproof.core")
    ]
    assert strays == []


@pytest.mark.parametrize("module", EVERYBODYS)
def test_importing_it_imports_nothing_optional(module: str) -> None:
    # What .pth files of the environment import at start-up is not ours, so count from there.
    program = f"""
import sys
before = {{name.partition(".")[0] for name in sys.modules}}
import {module}
print(*sorted({{name.partition(".")[0] for name in sys.modules}} - before - sys.stdlib_module_names))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == ["retryproof"]
