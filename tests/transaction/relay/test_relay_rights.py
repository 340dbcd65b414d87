"""A relay and an application as ordinary roles, with the rights that the documentation names and no others."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from retryproof.core.errors import ConfigurationError
from retryproof.inbox.operator import InboxOperator
from retryproof.outbox.operator import Operator
from retryproof.publishers import Failed
from retryproof.stores.sql.migrate import migrate
from retryproof.transaction import Inbox, Outbox, Relay
from tests.transaction.outboxes import QUICK, Database, Noting, until_empty

PAGE = Path(__file__).parents[3] / "docs" / "howto" / "outbox-and-relay.md"
FUNCTION = "FUNCTION pg_catalog.pg_control_system()"


class Roles:
    """A schema with an outbox, and two roles with the page's rights."""

    def __init__(self, url: str, schema: str) -> None:
        self._url = url
        self._schema = schema
        self.app, self.relay = f"app_{schema}", f"relay_{schema}"

    def url(self, role: str = "") -> str:
        parts = urlsplit(self._url)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit(
            parts._replace(netloc=f"{role}@{host}" if role else parts.netloc, query=f"schema={self._schema}")
        )

    def execute(self, *statements: str) -> None:
        """As the superuser."""
        with psycopg.connect(self._url, autocommit=True, options=f"-c search_path={self._schema}") as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def create(self) -> None:
        migrate(self.url())
        (grants,) = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
        grants = grants.replace("TO app;", f"TO {self.app};").replace("TO relay;", f"TO {self.relay};")
        for role in (self.app, self.relay):
            self.execute(f"CREATE ROLE {role} LOGIN", f"GRANT USAGE ON SCHEMA {self._schema} TO {role}")
        self.execute(grants)

    def drop(self) -> None:
        for role in (self.app, self.relay):
            self.execute(f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.fixture
def roles(postgres_url: str, unique: str) -> Iterator[Roles]:
    made = Roles(postgres_url, unique)
    made.create()
    yield made
    made.drop()


@pytest.fixture
def revoked(roles: Roles) -> Iterator[None]:
    """Nobody but superusers may ask which cluster it is."""
    roles.execute(f"REVOKE EXECUTE ON {FUNCTION} FROM PUBLIC")
    yield
    roles.execute(f"GRANT EXECUTE ON {FUNCTION} TO PUBLIC")


async def work(roles: Roles) -> None:
    """An outbox's whole life: add, publish, fail, dead letters, requeue, take over from a dead relay."""
    app = Database(roles.url(roles.app))
    with app.transaction() as connection:
        app.outbox.notify(connection)
    bad, _ = app.send("bad", "good")
    dying = Relay(roles.url(roles.relay), Noting(), policy=QUICK)
    member = await dying._joined()
    await member.balance()
    assert len(await member.claim()) == 2
    roles.execute("UPDATE retryproof_outbox_relays SET lease_until = 0")
    await dying._opened().aclose()
    publisher = Noting(lambda message: Failed("no", permanent=message.attempts > 0) if message.key == "bad" else None)
    relay = Relay(roles.url(roles.relay), publisher, policy=QUICK)
    await until_empty(relay)
    operator = Operator(roles.url(roles.relay))
    assert await operator.requeue([bad.id]) == 1
    publisher.fails = lambda message: None
    await until_empty(relay)
    assert publisher.payloads == ["good:1", "bad:0"]
    assert (await operator.stats()).pending == 0
    assert await operator.purge(0.0) == 0
    assert await operator.drop([bad.id]) == 0
    assert await operator.adopt() == 0
    await operator.aclose()
    await relay.aclose()


async def test_t6_the_rights_that_the_documentation_names_are_enough(
    roles: Roles, caplog: pytest.LogCaptureFixture
) -> None:
    await work(roles)
    assert "may not ask" not in caplog.text
    relay = Relay(roles.url(roles.relay), Noting(), policy=QUICK)
    await relay.run_once()
    await relay.aclose()
    roles.execute("UPDATE retryproof_outbox_settings SET cluster = '1'")
    with pytest.raises(ConfigurationError, match="another PostgreSQL cluster"):
        await relay.run_once()
    await relay.aclose()


@pytest.mark.usefixtures("revoked")
async def test_t6_a_relay_that_may_not_ask_which_cluster_it_is_works_and_says_what_to_grant(
    roles: Roles, caplog: pytest.LogCaptureFixture
) -> None:
    await work(roles)
    assert f"GRANT EXECUTE ON {FUNCTION} TO {roles.relay}" in caplog.text
    app = Database(roles.url(roles.app))
    app.send("a")
    roles.execute("UPDATE retryproof_outbox SET xid = xid + 1000000000")
    relay = Relay(roles.url(roles.relay), Noting(), policy=QUICK)
    with pytest.raises(ConfigurationError, match="another PostgreSQL cluster"):
        await relay.run_once()
    await relay.aclose()


async def test_t6_a_right_that_is_missing_is_named(roles: Roles) -> None:
    roles.execute(f"REVOKE UPDATE ON retryproof_outbox_partitions FROM {roles.relay}")
    relay = Relay(roles.url(roles.relay), Noting(), policy=QUICK)
    with pytest.raises(ConfigurationError, match="permission denied for table retryproof_outbox_partitions"):
        await relay.run_once()
    await relay.aclose()


def test_t5_an_application_needs_no_right_to_read_what_it_added(roles: Roles) -> None:
    app = Database(roles.url(roles.app))
    app.send("a", None)
    with app.transaction() as connection:
        Outbox().add(connection, topic="t", payload=b"")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        app.rows("SELECT * FROM retryproof_outbox")


async def test_t4_the_rights_that_the_documentation_names_are_enough_for_an_inbox(roles: Roles) -> None:
    roles.execute(
        f"GRANT SELECT, INSERT, UPDATE ON retryproof_inbox TO {roles.app}",
        f"GRANT SELECT, INSERT ON retryproof_inbox_dead TO {roles.app}",
        f"GRANT SELECT, UPDATE, DELETE ON retryproof_inbox, retryproof_inbox_dead TO {roles.relay}",
    )
    inbox = Inbox("billing")
    with Database(roles.url(roles.app)).transaction() as connection:
        answers = inbox.receive_many(connection, "s", [("1", b"a"), ("1", b"a"), ("1", b"b"), ("1", b"c")])
        inbox.keep(connection, answers[0], result=b"kept")
    assert [answer.status for answer in answers] == ["fresh", "duplicate", "dead", "dead"]
    operator = InboxOperator(roles.url(roles.relay))
    letter, _ = await operator.dead()
    assert await operator.drop([letter.name]) == 1
    assert (await operator.purge_dead(-60.0), await operator.purge(-60.0)) == (1, 1)
    assert (await operator.stats()).messages == 0
    await operator.aclose()
