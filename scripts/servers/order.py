"""Which server the tests use: the order, the run directories, and what is recorded in them."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from servers.instance import Instance, start
from servers.probes import Answer, NoAnswer
from servers.processes import ProcessId
from servers.table import PROJECT, SERVICES, Service, version_of


class Missing(Exception):
    """No server answers and none can be started; says what to install."""


class Unanswered(Exception):
    """An environment variable names a server that does not answer."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answered, and where it came from."""

    name: str
    url: str
    answer: Answer
    origin: str

    def __str__(self) -> str:
        service = SERVICES[self.name]
        kind = service.kind if self.answer.product == service.product else "real or not, it does not say"
        return f"{self.answer.product} {self.answer.version} ({kind}), {self.origin}, {without_password(self.url)}"


class RunDirectory:
    """A directory that holds private instances' data and records; whoever owns it stops exactly those."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o755, exist_ok=True)

    @classmethod
    def of_project(cls) -> "RunDirectory":
        """The one behind `scripts/services up` in this checkout."""
        return cls(_base() / ("up-" + hashlib.sha256(os.fsencode(PROJECT)).hexdigest()[:10]))

    @classmethod
    def of_session(cls) -> "RunDirectory":
        """A new one for one test session; first clears up after sessions that died."""
        _sweep()
        owner = ProcessId.of(os.getpid())
        return cls(Path(tempfile.mkdtemp(prefix=f"session-{owner.pid}-{owner.began}-", dir=_base())))

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Held by one process at a time: several test workers start one server between them."""
        with (self.path / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def instances(self) -> list[Instance]:
        return [Instance.recorded(record) for record in sorted(self.path.glob("*.json"))]

    def start(self, service: Service, options: tuple[str, ...] = ()) -> Instance:
        """A new private instance in here; Missing where its program is not installed."""
        binary = service.find()
        if binary is None:
            raise Missing(f"no {service.product} here: {service.needs}, or set {service.variable}")
        self.path.chmod(0o755)  # mkdtemp's 0700 would keep PostgreSQL's user out
        return start(service, binary, self.path, options)

    def shared(self, service: Service) -> Instance:
        """The instance that everyone who uses this directory shares; started by the first who asks."""
        with self.lock(service.name):
            marker = self.path / f"{service.name}.shared"
            if marker.exists():
                instance = Instance.recorded(self.path / marker.read_text())
                if instance.alive():
                    return instance
            instance = self.start(service)
            marker.write_text(f"{instance.directory.name}.json")
            return instance

    def running(self, service: Service) -> Instance | None:
        """The shared instance, where it was started and still runs."""
        marker = self.path / f"{service.name}.shared"
        if not marker.exists():
            return None
        instance = Instance.recorded(self.path / marker.read_text())
        return instance if instance.alive() else None

    def clear(self) -> list[Instance]:
        """Stops what was started in here, removes the directory, and tells what it stopped."""
        stopped = [instance for instance in self.instances() if instance.alive()]
        for instance in stopped:
            instance.stop()
        shutil.rmtree(self.path, ignore_errors=True)
        return stopped


def resolve(name: str, run: RunDirectory) -> Server:
    """The server to use, started in the run directory if need be; Missing or Unanswered otherwise."""
    service = SERVICES[name]
    found = _answering(service)
    if found is not None:
        return found
    instance = run.shared(service)
    return Server(name, instance.url, _said(instance), f"private, {instance.binary}")


def plan(name: str) -> str:
    """What `resolve` would use, in words, without starting anything."""
    service = SERVICES[name]
    try:
        found = _answering(service)
    except Unanswered as error:
        return str(error)
    if found is not None:
        return str(found)
    binary = service.find()
    if binary is None:
        return f"missing: {service.needs}"
    return f"{service.product} {version_of(binary)} ({service.kind}), private, started when first needed, {binary}"


def start_private(name: str, *options: str, run: RunDirectory | None = None) -> Instance:
    """A server of one's own, to be killed, paused and restarted; never a shared one.

    `options` go to the server's command line (`"--maxmemory", "10mb"`; `"-c", "wal_level=logical"`). Without `run`
    a new session directory is used, which goes with the instance's own process.
    """
    return (run or RunDirectory.of_session()).start(SERVICES[name], options)


def answering(name: str) -> Server | None:
    """The server that answers now, without starting one."""
    return _answering(SERVICES[name])


def without_password(url: str) -> str:
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))


def _answering(service: Service) -> Server | None:
    wanted = os.environ.get(service.variable)
    if wanted:
        return _named(service, wanted)
    standard = service.url_at(service.port)
    try:
        answer = service.probe(standard)
    except NoAnswer:
        pass
    else:
        if answer.product == service.product:
            return Server(service.name, standard, answer, "standard port")
    instance = RunDirectory.of_project().running(service)
    if instance is not None:
        return Server(service.name, instance.url, _said(instance), f"scripts/services up, {instance.binary}")
    return None


def _said(instance: Instance) -> Answer:
    return Answer(instance.answer.product, instance.version)


def _named(service: Service, url: str) -> Server:
    try:
        answer = service.probe(url)
    except NoAnswer as cause:
        raise Unanswered(f"{service.variable}={without_password(url)} does not answer: {cause}") from cause
    if answer.product != service.product and not service.emulator:  # whoever has a better one than ours may name it
        raise Unanswered(f"{service.variable} wants {service.product}, but {answer.product} answers")
    return Server(service.name, url, answer, service.variable)


def _base() -> Path:
    """In the temporary directory: short enough for sockets, and open to PostgreSQL's own user."""
    base = Path(tempfile.gettempdir()) / f"retryproof-services-{os.getuid()}"
    base.mkdir(mode=0o755, exist_ok=True)
    if base.is_symlink() or base.stat().st_uid != os.getuid():
        raise RuntimeError(f"{base} belongs to someone else")
    return base


def _sweep() -> None:
    """Stops what sessions left behind that were killed before they could."""
    for path in _base().glob("session-*"):
        _, pid, began, *_ = path.name.split("-")
        if not ProcessId(int(pid), began).alive():
            RunDirectory(path).clear()
