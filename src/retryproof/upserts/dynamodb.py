"""DynamoDB's form of `insert_once`: an item is put unless one with its primary key is there (T8).

It is one conditional PutItem, and a refusal returns the existing item: one round trip in both cases.

The condition. DynamoDB has one unique key, the table's primary key, and a request cannot name it. A condition on an
attribute outside the key, such as `attribute_not_exists(email)`, would replace an item that lacks this attribute. So
the condition names every string, number and binary attribute of the item. The key's attributes are among them, and
every existing item has those.

Lost replies. If a reply is late or lost, botocore sends the request again, and the second one finds the item of the
first. So each item has the nonce of the call that put it, in a separate attribute. A refusal by an item with this
call's nonce means that this call created it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Clamped, Context, Decimal, DecimalException, Inexact, Overflow, Rounded, Underflow
from inspect import iscoroutinefunction
from typing import Any, Protocol
from uuid import UUID, uuid4

from retryproof.core.errors import ConfigurationError

NONCE = "retryproof_nonce"
"""The attribute with the nonce; it is left out of the returned item."""
MOST_SCALARS = 100
"""An expression has at most 4,096 bytes, and each attribute takes 30 of them."""
_NUMBER = Context(prec=38, Emin=-128, Emax=126, traps=[Clamped, Inexact, Overflow, Rounded, Underflow])
"""DynamoDB's numbers: 38 digits, without rounding."""
_SCALARS = ("S", "N", "B")
"""The types that an attribute of a primary key can have."""


class Client(Protocol):
    """The used part of a client of boto3, aiobotocore or aioboto3."""

    @property
    def put_item(self) -> Callable[..., Any]: ...


@dataclass(frozen=True, slots=True)
class Put:
    """created: whether this call made the item. item: as it is in the table, numbers as Decimals."""

    created: bool
    item: Mapping[str, Any]


def put_once(
    client: Client, table: str, item: Mapping[str, Any], *, nonce: UUID | None = None, attribute: str = NONCE
) -> Put:
    """Put an item unless one with its primary key exists; return the item that exists then.

    client: `boto3.client("dynamodb")`. item: Python values, as boto3's tables take them: no floats, no empty sets.
    nonce: identifies the creator; by default each call has a new one. If attempts share a nonce, such as
        `current_operation().derive("order")`, all of them learn that they created the item.
    attribute: the attribute that holds the nonce.
    Two items with the same key and different values count as the same: compare the returned item with yours.
    Raises ConfigurationError, before anything is written, for a value that DynamoDB cannot store, an item over 400 KB
    or without the table's key, and a missing table. If no answer came, botocore's error is raised: call again, with the
    same nonce.
    """
    if iscoroutinefunction(getattr(client, "close", None)):
        raise ConfigurationError("This client is awaited: use aput_once.")
    put = _Putting(client, table, item, nonce, attribute)
    try:
        client.put_item(**put.request)
    except Exception as error:  # noqa: BLE001  # raised again unless it says that the item is there
        return put.settled(error)
    return put.created()


async def aput_once(
    client: Client, table: str, item: Mapping[str, Any], *, nonce: UUID | None = None, attribute: str = NONCE
) -> Put:
    """`put_once` through a client of aiobotocore or aioboto3."""
    if not iscoroutinefunction(getattr(client, "close", None)):
        raise ConfigurationError("This client blocks: use put_once.")
    put = _Putting(client, table, item, nonce, attribute)
    try:
        await client.put_item(**put.request)
    except Exception as error:  # noqa: BLE001  # as above
        return put.settled(error)
    return put.created()


class _Putting:
    """One put: the request, and the meaning of its answer."""

    def __init__(self, client: object, table: str, item: Mapping[str, Any], nonce: UUID | None, attribute: str) -> None:
        if hasattr(getattr(client, "meta", None), "client"):
            raise ConfigurationError("Pass a client, as boto3.client('dynamodb') gives, not a resource or a table.")
        if attribute in item:
            raise ConfigurationError(f"The item has {attribute!r} of its own; name another attribute=.")
        self._table = table
        self._attribute = attribute
        self._item = {name: encoded(value, name) for name, value in item.items()}
        self._nonce = {"S": str(nonce or uuid4())}
        scalars = [name for name, value in self._item.items() if next(iter(value)) in _SCALARS]
        if not 1 <= len(scalars) <= MOST_SCALARS:
            raise ConfigurationError(
                f"The item has {len(scalars)} strings, numbers and binaries at its top, and can have 1 to "
                f"{MOST_SCALARS}: its key is one of them. Put others into a map."
            )
        names = {f"#{number}": name for number, name in enumerate(scalars)}
        self.request: dict[str, Any] = {
            "TableName": table,
            "Item": {**self._item, attribute: self._nonce},
            "ConditionExpression": " AND ".join(f"attribute_not_exists({place})" for place in names),
            "ExpressionAttributeNames": names,
            "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        }

    def created(self) -> Put:
        """The result of a put that was not refused."""
        return Put(True, _plain(self._item))

    def settled(self, error: Exception) -> Put:
        """The result of a refusal; raises any other error."""
        response = getattr(error, "response", None)
        answer: Mapping[str, Any] = response if isinstance(response, Mapping) else {}
        said = answer.get("Error", {})
        match said.get("Code"):
            case "ConditionalCheckFailedException" if "Item" in answer:
                present = dict(answer["Item"])
                mine = present.pop(self._attribute, None) == self._nonce
                return Put(mine, _plain(present))
            case "ResourceNotFoundException":
                raise ConfigurationError(f"There is no table {self._table!r} in this account and region.") from error
            case "ValidationException" if "Item size" in said.get("Message", ""):
                raise ConfigurationError(
                    "The item is over DynamoDB's limit of 400 KB. Store its large part elsewhere, and put where it is."
                ) from error
            case "ValidationException":
                raise ConfigurationError(
                    f"The table {self._table!r} does not take this item, or the client is a resource's "
                    f"(`table.meta.client`): {said.get('Message')}"
                ) from error
        raise error


def encoded(value: object, path: str) -> dict[str, Any]:
    """A value in DynamoDB's form, as `{"S": "text"}`; ConfigurationError, with its path, if it has none."""
    match value:
        case None:
            return {"NULL": True}
        case bool():
            return {"BOOL": value}
        case str():
            return {"S": value}
        case int() | Decimal():
            return {"N": _number(value, path)}
        case bytes() | bytearray() | memoryview():
            return {"B": bytes(value)}
        case set() | frozenset():
            return _set(value, path)
        case list() | tuple():
            return {"L": [encoded(part, f"{path}[{number}]") for number, part in enumerate(value)]}
        case Mapping() if all(isinstance(name, str) for name in value):
            return {"M": {name: encoded(part, f"{path}.{name}") for name, part in value.items()}}
        case float():
            raise _unfit(path, "is a float, which is not exact; give a Decimal, as Decimal(str(value))")
    raise _unfit(
        path, f"is of the type {type(value).__name__}, which DynamoDB does not have; give a string or a number"
    )


def _number(value: int | Decimal, path: str) -> str:
    try:
        number = _NUMBER.create_decimal(value)
    except DecimalException:
        raise _unfit(path, "has more than 38 digits, or is out of range, and would be rounded") from None
    if not number.is_finite():
        raise _unfit(path, f"is {number}, which is no number to DynamoDB")
    return str(number)


def _set(value: set[Any] | frozenset[Any], path: str) -> dict[str, Any]:
    if not value:
        raise _unfit(path, "is an empty set, which DynamoDB cannot keep; leave it out")
    parts = [encoded(part, path) for part in value]
    kinds = {kind for part in parts for kind in part}
    if len(kinds) > 1 or not kinds <= set(_SCALARS):
        raise _unfit(path, "is a set of other than strings alone, numbers alone or bytes alone; give a list")
    (kind,) = kinds
    return {f"{kind}S": [part[kind] for part in parts]}


def _unfit(path: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"{path} {why}.")


def _plain(item: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: decoded(value) for name, value in item.items()}


def decoded(value: Mapping[str, Any]) -> Any:
    """A value from DynamoDB's own form: numbers as Decimals, binaries as bytes, lists and maps, sets."""
    ((kind, held),) = value.items()
    match kind:
        case "NULL":
            return None
        case "N":
            return Decimal(held)
        case "NS":
            return {Decimal(part) for part in held}
        case "SS" | "BS":
            return set(held)
        case "L":
            return [decoded(part) for part in held]
        case "M":
            return _plain(held)
        case _:
            return held
