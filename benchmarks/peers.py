"""Virtual environments of their own for the peers, below benchmarks/.peers/, made when missing."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

_HOME = Path(__file__).parent / ".peers"
_SERVER = ("fastapi", "uvicorn", "uvloop", "httptools", "redis[hiredis]")
_CLIENT = ("asyncpg==0.32.0", "uvloop")
PEERS = {"idemkit": "idemkit==1.0.2", "idemgate": "idemgate==0.1"}
"""Of the HTTP layer, on Redis."""
OUTBOX_PEERS = {
    "txoutbox": "txoutbox==0.2.2",
    "pgqueuer": "pgqueuer==1.6.0",
    "faststream-outbox": "faststream-outbox[asyncpg]==0.19.0",
    "dbos": "dbos==3.4.0",
}
"""Of outbox, relay and steps, on PostgreSQL."""
INSTALL_SECONDS = 180


class PeerMissing(RuntimeError):
    """A peer could not be installed."""


def peer_python(name: str) -> str:
    """The interpreter of a peer's environment, installed on first use."""
    home = _HOME / name
    python, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        venv.create(home, with_pip=True)
        package, beside = (PEERS[name], _SERVER) if name in PEERS else (OUTBOX_PEERS[name], _CLIENT)
        install = [str(python), "-m", "pip", "install", "-q", package, *beside]
        try:
            subprocess.run(install, check=True, timeout=INSTALL_SECONDS, stdout=sys.stderr)
        except (subprocess.SubprocessError, OSError) as error:
            raise PeerMissing(f"{package} could not be installed: {error}") from error
        done.touch()
    return str(python)


def installed_versions(name: str) -> dict[str, str]:
    """What the peer's server runs on, for the method's line."""
    program = "import importlib.metadata as m, json, sys;print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    names = [name, "fastapi", "redis", "hiredis", "uvicorn"]
    output = subprocess.run([peer_python(name), "-c", program, *names], check=True, capture_output=True, text=True)
    versions: dict[str, str] = json.loads(output.stdout)
    return versions
