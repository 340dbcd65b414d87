"""`retryproof` itself, `migrate`, `reap` and `demo`: exit codes, JSON, and no password in what is printed (O1, O4)."""

import subprocess
import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace
from urllib.parse import urlsplit

import psycopg
import pytest

from retryproof.cli import exits
from retryproof.cli.output import duration
from retryproof.core.address import redacted, scrubbed
from retryproof.core.commands import Complete
from retryproof.core.keys import short_digest
from retryproof.core.record import Record
from retryproof.observe.events import Event, Kind
from retryproof.reaper import areap_all, reap_all
from retryproof.sql.postgres.migrate import migrations
from retryproof.stores import MemoryStore, Store
from retryproof.stores.threaded import InThread
from tests.cli.conftest import Run, abandon, claim

# Migrate


def test_o4_migrate_applies_everything_once_and_then_has_nothing_to_do(
    run: Run, postgres_url: str, unique: str
) -> None:
    url = f"{postgres_url}?schema={unique}"
    names = [migration.name for migration in migrations()]

    before = run("migrate", url, "--check", "--json")
    assert (before.code, before.document["pending"]) == (1, names)
    refused = run("keys", "list", url)
    assert refused.code == exits.USAGE
    assert "run `retryproof migrate" in refused.err
    first = run("migrate", url, "--json")
    assert (first.code, first.document["applied"]) == (0, names)
    second = run("migrate", url)
    assert (second.code, second.out) == (0, "Nothing to do: every migration was applied before.\n")
    assert run("migrate", url, "--check").code == 0
    assert run("keys", "list", url).code == 0


def test_o4_an_old_schema_says_migrate(run: Run, postgres_url: str, unique: str) -> None:
    url = f"{postgres_url}?schema={unique}"
    run("migrate", url)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f'DELETE FROM "{unique}".retryproof_schema'.encode())

    ran = run("keys", "list", url, "--json")

    assert ran.code == exits.USAGE
    assert "retryproof migrate" in ran.document["error"]["message"]


@pytest.mark.parametrize("url", ["memory://", "sqlite:///keys.db", "redis://127.0.0.1:1", "rediss://127.0.0.1:1"])
def test_o4_stores_without_migrations_have_nothing_to_do(run: Run, url: str) -> None:
    ran = run("migrate", url)

    assert ran.code == 0
    assert ran.out.startswith("Nothing to do")


# Reap


def test_c19_reap_removes_what_is_over_and_lists_what_ended_without_an_outcome(
    run: Run, url: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    ended = [abandon(store, f"dead-{number}", unsettled_retention=0.001) for number in range(3)]
    kept = abandon(store, "kept")
    claim(store, "live")

    with caplog.at_level("INFO", "retryproof"):
        ran = run("reap", url, "--json", "--limit", "2")

    assert ran.code == 0
    assert (ran.document["unsettled"], ran.document["more"]) == (3, False)
    assert {it["id"] for it in ran.document["ended"]} == {record.id.hex() for record in ended}
    assert all(f"{short_digest(record.id)} ends without an outcome" in ran.err for record in ended)
    assert sum(message.startswith("evicted") for message in caplog.messages) == 3
    assert store.get([kept.id])[0] is not None
    assert "Removed 0 settled and 0 unsettled" in run("reap", url).out


def test_c19_reap_once_makes_one_pass_and_says_that_there_is_more(run: Run, url: str, store: Store) -> None:
    if store.capabilities.native_ttl:
        pytest.skip("its pass is bounded by the keys that it looks at")
    for number in range(3):
        abandon(store, f"dead-{number}", unsettled_retention=0.001)

    ran = run("reap", url, "--once", "--limit", "2")

    assert "2 unsettled in 1 pass." in ran.out
    assert "There is more" in ran.out
    assert "dead" not in ran.out


class Clock:
    now = 1_000_000_000

    def __call__(self) -> int:
        return self.now


def expiring(store: Store, clock: Clock) -> list[Record]:
    for number in range(5):
        claimed, held = claim(store, f"done-{number}")
        store.complete([Complete(claimed.id, claimed.nonce, held.token, b"r")])
    dead = [claim(store, f"dead-{number}", lease=1.0)[0].id for number in range(2)]
    records = [record for record in store.get(dead) if record is not None]
    clock.now += 2 * 3600 * 1_000_000
    return records


def test_c12_the_reaper_counts_passes_and_tells_of_each_unsettled_end() -> None:
    clock = Clock()
    store = MemoryStore(clock)
    dead = expiring(store, clock)
    events: list[Event] = []
    ended: list[Record] = []

    totals = reap_all(store, limit=2, events=[events.append], on_ended=ended.append)

    assert (totals.settled, totals.unsettled, totals.more) == (5, 2, False)
    assert totals.passes == 4
    assert [event.kind for event in events] == [Kind.EVICTED] * 2
    assert {event.digest for event in events} == {short_digest(record.id) for record in dead}
    assert {record.id for record in ended} == {record.id for record in dead}


async def test_c19_the_reaper_serves_event_loops_too() -> None:
    clock = Clock()
    blocking = MemoryStore(clock)
    expiring(blocking, clock)
    store = InThread(blocking)

    assert (await areap_all(store, limit=3, passes=1, events=[])).more
    assert not (await areap_all(store, events=[])).more
    await store.aclose()


# Errors, and what is never printed


@pytest.mark.parametrize("command", [("reap",), ("keys", "list"), ("doctor",)])
@pytest.mark.parametrize(
    "url",
    ["redis://user:p%40ss-w0rd@127.0.0.1:1/0", "postgresql://user:p%40ss-w0rd@127.0.0.1:1/db?connect_timeout=2"],
)
def test_o1_an_unreachable_store_is_exit_code_3_without_its_password(
    run: Run, command: tuple[str, ...], url: str
) -> None:
    for ran in (run(*command, url), run(*command, url, "--json")):
        assert ran.code == exits.UNREACHABLE
        assert "p@ss-w0rd" not in ran.out + ran.err
        assert "p%40ss-w0rd" not in ran.out + ran.err


@pytest.mark.parametrize("command", [("reap",), ("keys", "list"), ("doctor",), ("migrate",), ("outbox", "stats")])
def test_o1_a_database_that_is_not_there_is_wrong_usage(run: Run, command: tuple[str, ...], postgres_url: str) -> None:
    ran = run(*command, urlsplit(postgres_url)._replace(path="/mistyped").geturl())
    assert ran.code == exits.USAGE
    assert 'database "mistyped" does not exist' in ran.err


def test_o1_an_unknown_url_is_wrong_usage_and_names_the_schemes(run: Run) -> None:
    for command in (("doctor",), ("migrate",), ("reap",), ("keys", "list")):
        ran = run(*command, "mongodb+srv://u:secret@h", "--json")
        assert ran.code == exits.USAGE
        assert "retryproof[redis]" in ran.document["error"]["message"]
        assert "secret" not in ran.out + ran.err


def test_no_url_at_all_names_the_variable(run: Run) -> None:
    for command in (("doctor",), ("migrate",), ("reap",), ("keys", "list"), ("keys", "show", "abcd")):
        ran = run(*command)
        assert ran.code == exits.USAGE
        assert "RETRYPROOF_STORE" in ran.err


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///keys.db", "sqlite:///keys.db"),
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://:pw@h/0", "redis://:***@h/0"),
        ("postgresql://u:p%2Fw@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u:a@b@h/d", "postgresql://***"),  # a library may take b@h for the host
        ("postgresql://u@h/d?password=hush&sslmode=require", "postgresql://u@h/d?password=***&sslmode=require"),
        ("redis://h/0?password=hu%20sh", "redis://h/0?password=***"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_a_drivers_message_loses_the_password_in_either_spelling() -> None:
    assert scrubbed("no login with p/w or p%2Fw", "postgresql://u:p%2Fw@h/d") == "no login with *** or ***"


# The program


def test_the_package_installs_the_program() -> None:
    (script,) = entry_points(group="console_scripts", name="retryproof")

    assert script.value == "retryproof.cli.__main__:main"


def test_the_program_runs_and_lists_its_exit_codes() -> None:
    command = [sys.executable, "-m", "retryproof.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)

    for word in ("demo", "doctor", "keys", "migrate", "reap", "Exit codes"):
        assert word in done.stdout


def test_an_interrupt_is_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("retryproof.cli.reap.reap_all", interrupted)

    assert run("reap", "memory://").code == exits.INTERRUPTED


@pytest.mark.parametrize("library", ["click", "rich"])
def test_without_its_libraries_the_program_names_the_extra(library: str) -> None:
    program = f"import sys; sys.modules[{library!r}] = None; from retryproof.cli.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)

    assert done.returncode == exits.USAGE
    assert "pip install 'retryproof[cli]'" in done.stderr


# Demo


@pytest.mark.parametrize(("answer", "code"), [(0, exits.DONE), (1, exits.FOUND), (2, exits.FOUND)])
def test_demo_runs_the_demo_and_exits_by_its_answer(
    run: Run, monkeypatch: pytest.MonkeyPatch, answer: int, code: int
) -> None:
    asked: list[dict[str, object]] = []

    def run_demo(**options: object) -> int:
        asked.append(options)
        return answer

    runner = ModuleType("retryproof.demo.runner")
    runner.run_demo = run_demo  # type: ignore[attr-defined]  # a stand-in: the demo itself has its own tests
    monkeypatch.setitem(sys.modules, "retryproof.demo", SimpleNamespace(runner=runner, __path__=[]))
    monkeypatch.setitem(sys.modules, "retryproof.demo.runner", runner)

    assert run("demo", "--charges", "10", "--seed", "7", "--json").code == code
    assert asked == [{"charges": 10, "seed": 7, "json": True}]


def test_demo_without_its_libraries_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['uvicorn'] = None; sys.modules['fastapi'] = None; "
        "from retryproof.cli.__main__ import main; sys.argv = ['retryproof', 'demo']; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)

    assert done.returncode == exits.USAGE, done.stderr
    assert "pip install 'retryproof[demo]'" in done.stderr


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.25, "0.2 s"), (90.0, "90.0 s"), (180.0, "3 min"), (7200.0, "2 h"), (432_000.0, "5 d")]
)
def test_durations_are_shown_as_people_say_them(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
