"""Stored results: C12, C16, C17, C21 and H9."""

import dataclasses
import enum
import json
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Optional,
    TypedDict,
    TypeVar,
    Union,
)
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retryproof.core.codec import (
    Codec,
    JsonCodec,
    StoredResponse,
    Unencodable,
    _chunks_encoder,
    codec_for,
    decode_response,
    decode_value,
    encode_and_replay,
    encode_response,
    encode_value,
)
from retryproof.core.errors import ConfigurationError, Unreadable
from retryproof.core.scalars import MAX_DEPTH

# --- Responses ------------------------------------------------------------------------------------------------------

header_lists = st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=8)), max_size=6).map(tuple)
responses = st.builds(StoredResponse, st.integers(100, 999), header_lists, st.binary(max_size=40), st.booleans())

COOKIES = StoredResponse(
    201, ((b"set-cookie", b"a=1"), (b"Content-Type", b"text/html"), (b"set-cookie", b"a=2"), (b"x", b"")), b"<p>\0\xff"
)


@given(responses)
def test_h9_a_response_is_read_back_as_it_was(response: StoredResponse) -> None:
    assert decode_response(encode_response(response)) == response


def test_h9_repeated_header_names_keep_their_order() -> None:
    assert decode_response(encode_response(COOKIES)).headers == COOKIES.headers


def test_c12_an_empty_response_is_a_response() -> None:
    empty = StoredResponse(204, (), b"")
    assert decode_response(encode_response(empty)) == empty


def test_c17_a_large_response_is_read_back() -> None:
    large = StoredResponse(200, ((b"x", b"y" * 100_000),), b"z" * 1_048_576)
    assert decode_response(encode_response(large)) == large


@given(st.binary(max_size=80))
def test_c21_any_bytes_are_a_response_or_unreadable(data: bytes) -> None:
    try:
        response = decode_response(data)
    except Unreadable:
        return
    assert encode_response(response) == data


@given(st.integers(0, 2**16), st.integers(0, 2**32 - 1), st.binary(max_size=40))
def test_c21_a_damaged_head_is_unreadable_and_allocates_nothing(count: int, length: int, rest: bytes) -> None:
    data = struct.pack(">BBBHHI", 1, ord("R"), 0, 200, count % 65536, length) + rest
    try:
        response = decode_response(data)
    except Unreadable:
        return
    assert encode_response(response) == data


def test_c21_a_response_that_is_cut_off_anywhere_is_unreadable() -> None:
    data = encode_response(COOKIES)
    for end in range(len(data)):
        with pytest.raises(Unreadable):
            decode_response(data[:end])
    with pytest.raises(Unreadable):
        decode_response(data + b"x")


def test_c21_a_response_of_a_later_version_says_so() -> None:
    with pytest.raises(Unreadable, match="version 2"):
        decode_response(b"\x02" + encode_response(COOKIES)[1:])


@pytest.mark.parametrize(
    "response",
    [
        StoredResponse(70_000, (), b""),
        StoredResponse(-1, (), b""),
        StoredResponse(99, (), b""),
        StoredResponse(200, ((b"n" * 65536, b""),), b""),
        StoredResponse(200, ((b"n", b""),) * 65536, b""),
        StoredResponse(200, (("text", b""),), b""),  # type: ignore[arg-type]  # what an untyped app may send
    ],
)
def test_c17_what_no_response_can_be_is_unencodable(response: StoredResponse) -> None:
    with pytest.raises(Unencodable):
        encode_response(response)


# --- Values: the envelope -------------------------------------------------------------------------------------------


class Reversing:
    name = "reversing"

    def encode(self, value: bytes, /) -> bytes:
        return value[::-1]

    def decode(self, data: bytes, /) -> bytes:
        return data[::-1]


def test_c16_a_value_is_read_back_by_the_codec_that_wrote_it() -> None:
    assert decode_value(Reversing(), encode_value(Reversing(), b"abc")) == b"abc"


def test_c16_a_value_is_not_read_by_another_codec() -> None:
    with pytest.raises(Unreadable, match="'reversing'"):
        decode_value(JsonCodec(), encode_value(Reversing(), b"1"))


def test_c21_an_unknown_version_a_response_and_a_cut_off_envelope_are_unreadable() -> None:
    data = encode_value(JsonCodec(), 1)
    for broken in (b"\x02" + data[1:], encode_response(COOKIES), b"", data[:1], data[:2], data[:4]):
        with pytest.raises(Unreadable):
            decode_value(JsonCodec(), broken)


@given(st.binary(max_size=40), st.sampled_from([b"", b"\x01V", b"\x01V\x04json", b"\x01V\x04json["]))
def test_c21_any_bytes_are_a_value_or_unreadable(noise: bytes, start: bytes) -> None:
    for codec in (JsonCodec(), JsonCodec(Receipt), JsonCodec(Decimal), JsonCodec(tuple[int, str] | UUID)):
        try:
            decode_value(codec, start + noise)
        except Unreadable:
            pass


@pytest.mark.parametrize("payload", [b"[" * 100_000, b"1" * 5000, b"\xff", b"", b"{"])
def test_c21_json_that_cannot_be_parsed_is_unreadable(payload: bytes) -> None:
    with pytest.raises(Unreadable):
        decode_value(JsonCodec(int), b"\x01V\x04json" + payload)


class Forgetful(Reversing):
    def decode(self, data: bytes, /) -> bytes:
        raise KeyError(data)


def test_c17_what_cannot_be_read_back_is_unencodable() -> None:
    with pytest.raises(Unencodable, match="read back"):
        encode_and_replay(Forgetful(), b"abc")


def test_c16_the_first_caller_sees_the_value_as_a_replay_gives_it() -> None:
    moment = datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Berlin"))
    data, value = encode_and_replay(JsonCodec(datetime), moment)
    assert value == moment
    assert repr(value) == repr(decode_value(JsonCodec(datetime), data)) != repr(moment)


def test_c17_whatever_a_codec_raises_is_unencodable() -> None:
    with pytest.raises(Unencodable, match="Reversing"):
        encode_value(Reversing(), 7)


class Number(enum.IntEnum):
    ONE = 1


# --- Values: plain JSON ---------------------------------------------------------------------------------------------


def again(value: Any, annotation: Any = Any) -> Any:
    codec = JsonCodec(annotation)
    return decode_value(codec, encode_value(codec, value))


any_text = st.text(st.characters(), max_size=6)
plain_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), any_text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(any_text, inner, max_size=3)),
)


@given(plain_values)
def test_c16_plain_json_is_read_back_as_it_was(value: Any) -> None:
    decoded = again(value)
    assert decoded == value
    assert repr(decoded) == repr(value)


@given(plain_values)
def test_c16_plain_json_is_written_alike_with_and_without_the_encoder_in_c(value: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("json.encoder.c_make_encoder", None)
        in_python = _chunks_encoder()
        assert "".join(in_python(value, 0)) == JsonCodec().encode(value).decode("utf-8", "surrogatepass")


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ({"a": (1, {"b": ()}), "c": 2}, {"a": [1, {"b": []}], "c": 2}),
        ([(1,), {"a": [()]}], [[1], {"a": [[]]}]),
        ({"a": {"b": {"c": (1,)}}, "d": [2]}, {"a": {"b": {"c": [1]}}, "d": [2]}),
    ],
)
def test_c16_tuples_are_lists_for_every_caller_however_deep_and_the_given_value_stays(value: Any, seen: Any) -> None:
    before = repr(value)
    data, replayed = encode_and_replay(JsonCodec(), value)
    assert (repr(replayed), repr(decode_value(JsonCodec(), data)), repr(value)) == (repr(seen), repr(seen), before)


@pytest.mark.parametrize("value", [None, "", False, 0, 0.0, [], {}, "\ud83d\ude00"])
def test_c12_empty_false_and_zero_values_are_values(value: Any) -> None:
    assert repr(again(value)) == repr(value)


def deep(levels: int = 100_000, wrap: Callable[[Any], Any] = lambda value: [value]) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "wrap", [lambda value: [value], lambda value: (value,), lambda value: {"a": value}], ids=["list", "tuple", "dict"]
)
def test_c16_what_is_written_is_read_however_deep_the_reader_is(wrap: Callable[[Any], Any]) -> None:
    data = encode_value(JsonCodec(), deep(MAX_DEPTH, wrap))
    with pytest.raises(Unencodable, match="lists and objects"):
        encode_value(JsonCodec(), deep(MAX_DEPTH + 1, wrap))

    def read(frames: int) -> Any:
        return read(frames - 1) if frames else decode_value(JsonCodec(), data)

    read(sys.getrecursionlimit() // 2)


class Unspeakable(Exception):
    def __repr__(self) -> str:
        raise ValueError

    __str__ = __repr__


class Nameless(JsonCodec):
    """A codec that raises wherever it can."""

    @property
    def name(self) -> str:  # type: ignore[override]  # a property in place of a value
        raise Unspeakable


class Speechless(JsonCodec):
    """A codec whose error cannot be printed."""

    def encode(self, value: Any, /) -> bytes:
        raise Unspeakable


@pytest.mark.parametrize("codec", [Nameless(), Speechless()], ids=["name", "encode"])
def test_c17_even_what_cannot_be_said_is_unencodable(codec: Codec) -> None:
    with pytest.raises(Unencodable):
        encode_and_replay(codec, 1)


def test_c17_a_result_that_another_thread_changes_is_unencodable(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(value: object, indent: int) -> list[str]:
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr("retryproof.core.codec._chunks", changed)
    with pytest.raises(Unencodable, match="changed size"):
        encode_and_replay(JsonCodec(), {"a": 1})


class Meta(type):
    """Of classes that cannot be hashed."""

    def __eq__(cls, other: object) -> bool:
        return cls is other


class Odd(metaclass=Meta):
    """A class that cannot be hashed."""


@pytest.mark.parametrize(
    "value",
    [
        {1: "a"},
        {1, 2},
        b"bytes",
        float("nan"),
        float("inf"),
        [float("-inf")],
        Decimal(1),
        object(),
        Number.ONE,
        type("Text", (str,), {})("x"),
        Odd(),
        {"a": [Odd()]},
    ],
)
def test_c16_what_json_cannot_give_back_is_unencodable(value: Any) -> None:
    with pytest.raises(Unencodable):
        encode_value(JsonCodec(), value)


@pytest.mark.parametrize("make", [deep, lambda: 10**5000], ids=["too deep", "too many digits"])
def test_c16_what_json_cannot_write_is_unencodable(make: Callable[[], Any]) -> None:
    with pytest.raises(Unencodable):
        encode_value(JsonCodec(), make())


# --- Values: annotations --------------------------------------------------------------------------------------------


class Currency(enum.Enum):
    EUR = 1
    EURO = 1  # noqa: PIE796 - an alias
    USD = 2


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: int
    y: Decimal


class Order(TypedDict):
    id: UUID
    note: NotRequired[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Receipt:
    id: UUID
    amount: Decimal
    at: datetime
    currency: Currency = Currency.EUR
    lines: tuple[str, ...] = ()
    parent: Optional["Receipt"] = None


@dataclasses.dataclass
class Doubling:
    amount: int
    derived: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.amount *= 2
        self.derived = self.amount + 1


OrderId = NewType("OrderId", str)
T = TypeVar("T")


@dataclasses.dataclass
class Box(Generic[T]):
    item: T


RECEIPT = Receipt(UUID(int=7), Decimal("1.50"), datetime(2026, 11, 24, 3, 14, 15, 9, tzinfo=UTC))
EAST = timezone(timedelta(hours=5, minutes=30))


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (None, None),
        (int, 2**100),
        (float, 1.5),
        (float, 1),
        (bytes, b"\0\xff"),
        (Decimal, Decimal("1.10")),
        (UUID, UUID(int=5)),
        (date, date(2026, 2, 28)),
        (datetime, datetime(2026, 2, 28, 1, 2, 3, 4)),  # noqa: DTZ001 - stays naive
        (datetime, datetime(2026, 2, 28, 1, 2, 3, 4, tzinfo=EAST)),
        (time, time(1, 2, 3, 4)),
        (timedelta, timedelta(days=-1, microseconds=1)),
        (Currency, Currency.USD),
        (Currency, Currency.EURO),
        (Rights, Rights.READ | Rights.WRITE),
        (Literal["a", 1, True], True),
        (Literal["a", 1, True], 1),
        (list, [1, "a"]),
        (list[Decimal], [Decimal(1)]),
        (Sequence[int], [1]),
        (tuple, (1, "a")),
        (tuple[()], ()),
        (tuple[int, ...], (1, 2, 3)),
        (tuple[int, bytes], (1, b"x")),
        (set[UUID], {UUID(int=1), UUID(int=2)}),
        (frozenset[int], frozenset({1, 2})),
        (dict, {"a": 1}),
        (dict[str, Decimal], {"a": Decimal(1)}),
        (Mapping[str, int], {"a": 1}),
        (dict[int, bytes], {1: b"x"}),
        (dict[tuple[int, int], str], {(1, 2): "x"}),
        (int | None, None),
        (int | None, 0),
        (int | str | None, None),
        (int | str | None, ""),
        (Union[Decimal, str], "1"),  # noqa: UP007 - the older spelling
        (Decimal | str, Decimal(1)),
        (list[int] | list[str], ["a"]),
        (Annotated[int, "cents"], 5),
        (Annotated[int, []], 6),
        (OrderId, OrderId("x")),
        (Point, Point(1, Decimal(2))),
        (Order, {"id": UUID(int=1)}),
        (Order, {"id": UUID(int=1), "note": ""}),
        (Receipt, RECEIPT),
        (Receipt, dataclasses.replace(RECEIPT, parent=RECEIPT, lines=("a", "b"))),
        (list[Receipt] | None, [RECEIPT]),
        (dict[str, Receipt | Point], {"a": RECEIPT, "b": Point(1, Decimal(2))}),
        (Doubling, Doubling(3)),
    ],
)
def test_c16_an_annotated_value_is_read_back_with_its_types(annotation: Any, value: Any) -> None:
    decoded = again(value, annotation)
    assert decoded == value
    assert repr(decoded) == repr(value)
    assert codec_for(annotation).name == "json"


receipts = st.builds(
    Receipt,
    st.uuids(),
    st.decimals(allow_nan=False, allow_infinity=False),
    st.datetimes(timezones=st.sampled_from([UTC, EAST])),
    st.sampled_from(Currency),
    st.lists(any_text, max_size=3).map(tuple),
)


@given(st.lists(st.one_of(receipts, st.none()), max_size=3))
def test_c16_dataclasses_are_read_back_as_they_were(value: list[Receipt | None]) -> None:
    assert again(value, list[Receipt | None]) == value


@dataclasses.dataclass(frozen=True)
class Refund(Receipt):
    reason: str = ""


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, True),
        (int, 1.0),
        (int, None),
        (str, 1),
        (float, float("nan")),
        (Decimal, Decimal("NaN")),
        (date, datetime.now(UTC)),
        (tuple[int, int], (1,)),
        (tuple[int, int], [1, 2]),
        (list[int], ("a",)),
        (list[int], ["a"]),
        (dict[str, int], {1: 1}),
        (int | str, 1.5),
        (Literal[1], True),
        (Order, {}),
        (Order, {"id": UUID(int=1), "extra": 1}),
        (Receipt, {"id": 1}),
        (Receipt, Refund(RECEIPT.id, RECEIPT.amount, RECEIPT.at, reason="lost")),
        (Receipt, Point(1, Decimal(2))),
        (Point, (1, Decimal(2))),
    ],
)
def test_c16_a_value_that_is_not_what_is_annotated_is_unencodable(annotation: Any, value: Any) -> None:
    with pytest.raises(Unencodable):
        encode_value(JsonCodec(annotation), value)


def test_c16_a_field_with_a_default_may_be_added_later() -> None:
    stored = json.dumps({"id": str(RECEIPT.id), "amount": "1.50", "at": RECEIPT.at.isoformat(), "removed": 1})
    assert JsonCodec(Receipt).decode(stored.encode()) == RECEIPT


@pytest.mark.parametrize(
    ("annotation", "payload"),
    [
        (int, b'"a"'),
        (int, b"true"),
        (bytes, b'"!"'),
        (Decimal, b'"x"'),
        (Decimal, b"1"),
        (UUID, b'"x"'),
        (datetime, b'"x"'),
        (Currency, b'"GBP"'),
        (Literal[1], b'"2"'),
        (tuple[int, int], b"[1]"),
        (int | str, b'["bool",true]'),
        (Receipt, b"{}"),
        (Receipt, b"[]"),
        (Order, b"{}"),
    ],
)
def test_c21_a_stored_value_that_does_not_fit_its_annotation_is_unreadable(annotation: Any, payload: bytes) -> None:
    with pytest.raises(Unreadable):
        decode_value(JsonCodec(annotation), b"\x01V\x04json" + payload)


@dataclasses.dataclass
class Dangling:
    item: "Missing"  # type: ignore[name-defined]  # noqa: F821 - does not exist on purpose


@dataclasses.dataclass
class Seeded:
    seed: dataclasses.InitVar[int]


@pytest.mark.parametrize(
    "annotation", [Seeded, complex, type, "Receipt", T, Box[int], Dangling, list[complex], type(lambda: 0)]
)
def test_c16_an_annotation_without_a_codec_is_an_error_that_names_it(annotation: Any) -> None:
    with pytest.raises(ConfigurationError):
        codec_for(annotation)


def test_c16_an_extension_comes_before_json() -> None:
    def for_bytes(annotation: object) -> Codec | None:
        return Reversing() if annotation is bytes else None

    assert codec_for(bytes, [for_bytes]).name == "reversing"
    assert codec_for(int, [for_bytes]).name == "json"


def test_c16_a_tuple_without_an_annotation_is_a_list_for_the_first_caller_too() -> None:
    stored, seen = encode_and_replay(JsonCodec(), {"pairs": ((1, 2), (3, 4))})
    assert seen == {"pairs": [[1, 2], [3, 4]]}
    assert decode_value(JsonCodec(), stored) == seen
