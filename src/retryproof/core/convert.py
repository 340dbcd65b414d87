"""Converters between typed values and plain JSON values, built from annotations.

A converter only accepts values that it can give back: of the exact types of the annotation, not of their subclasses. So
a replay has the type that the first caller saw. A converter is built once, when a function is decorated, and does not
deal with bytes.

A union stores the name of the member that accepted the value, as `[name, value]`; `X | None` stores null for None.
"""

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, Field, InitVar, fields, is_dataclass
from enum import Enum, Flag
from typing import (
    Annotated,
    Any,
    Literal,
    NewType,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from retryproof.core.errors import ConfigurationError
from retryproof.core.scalars import SCALARS, Converter, Unencodable, Unfit, as_text, expect, fit, name_of, unchanged


def converter_for(annotation: object) -> Converter:
    """Return the converter for an annotation; raise ConfigurationError, naming it, if there is none."""
    return _Builder().build(annotation)


class _Builder:
    """Builds converters. It remembers the classes that it is building, since a class may contain itself."""

    def __init__(self) -> None:
        self._classes: dict[type, Converter] = {}

    def build(self, annotation: object) -> Converter:
        try:
            scalar = SCALARS.get(annotation)
        except TypeError:  # an unhashable annotation, such as Annotated[int, []]
            scalar = None
        if scalar is not None:
            return scalar
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            return self.build(arguments[0])
        if origin is Literal:
            return _literal(arguments)
        if origin is Union or origin is types.UnionType:
            return self._union(arguments)
        if type(annotation).__name__ == "TypeAliasType":  # `type X = …`, of Python 3.12
            return self.build(getattr(annotation, "__value__"))  # noqa: B009 - typed for 3.11, which lacks it
        if isinstance(annotation, NewType):
            return self.build(annotation.__supertype__)
        collection = self._collection(origin or annotation, arguments)
        if collection is not None:
            return collection
        if isinstance(annotation, type):
            return self._class(annotation)
        raise _unsupported(annotation)

    def _collection(self, kind: object, arguments: tuple[Any, ...]) -> Converter | None:
        if kind in (list, Sequence):
            return _items(list, self.build(arguments[0] if arguments else Any))
        if kind in (set, frozenset, AbstractSet):
            return _items(frozenset if kind is frozenset else set, self.build(arguments[0] if arguments else Any))
        if kind is tuple:
            return self._tuple(arguments)
        if kind in (dict, Mapping):
            name, item = arguments or (str, Any)
            return _mapping(None if name is str else self.build(name), self.build(item))
        return None

    def _tuple(self, arguments: tuple[Any, ...]) -> Converter:
        if not arguments:
            return _items(tuple, self.build(Any))
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return _items(tuple, self.build(arguments[0]))
        return _fixed(tuple, tuple, [self.build(argument) for argument in arguments])

    def _union(self, members: tuple[Any, ...]) -> Converter:
        inner = [member for member in members if member is not type(None)]
        optional = len(inner) < len(members)
        if len(inner) == 1:
            return _optional(self.build(inner[0]))
        named = {name_of(member): self.build(member) for member in inner}
        if len(named) < len(inner):
            raise ConfigurationError(f"Two members of the union {members} have the same name; rename one.")
        return _tagged(named, optional=optional)

    def _class(self, kind: type) -> Converter:
        if issubclass(kind, Enum):
            return _enum(kind)
        if kind in self._classes:
            unfinished = self._classes
            return Converter(lambda value: unfinished[kind].encode(value), lambda value: unfinished[kind].decode(value))
        # This placeholder is only looked up, never called, until the class is built.
        self._classes[kind] = Converter(unchanged, unchanged)
        self._classes[kind] = self._members(kind)
        return self._classes[kind]

    def _members(self, kind: type) -> Converter:
        if is_typeddict(kind):
            return _typed_dict(kind, self._hints(kind))
        if is_dataclass(kind):
            return _dataclass(kind, self._hints(kind))
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            hints = self._hints(kind)
            return _fixed(kind, lambda items: kind(*items), [hints[name] for name in kind._fields])
        raise _unsupported(kind)

    def _hints(self, kind: type) -> dict[str, Converter]:
        try:
            hints = get_type_hints(kind)
        except NameError as error:
            raise ConfigurationError(f"The annotations of {name_of(kind)} cannot be resolved: {error}.") from error
        if any(isinstance(hint, InitVar) for hint in hints.values()):
            raise ConfigurationError(f"{name_of(kind)} has an InitVar, which cannot be read back; pass codec=.")
        members = {field.name for field in fields(kind)} if is_dataclass(kind) else set(hints)
        return {name: self.build(hint) for name, hint in hints.items() if name in members}


def _items(kind: type, item: Converter) -> Converter:
    def encode(value: Any) -> list[Any]:
        expect(kind, value)
        return [item.encode(each) for each in value]

    def decode(value: Any) -> Any:
        return kind([item.decode(each) for each in fit(list, value)])

    return Converter(encode, decode)


def _fixed(kind: type, make: Callable[[Iterable[Any]], Any], items: list[Converter]) -> Converter:
    def encode(value: Any) -> list[Any]:
        expect(kind, value)
        if len(value) != len(items):
            raise Unencodable(f"a tuple of {len(value)} where {len(items)} are annotated")
        return [item.encode(each) for item, each in zip(items, value, strict=True)]

    def decode(value: Any) -> Any:
        return make([item.decode(each) for item, each in zip(items, fit(list, value), strict=True)])

    return Converter(encode, decode)


def _mapping(name: Converter | None, item: Converter) -> Converter:
    """Return the converter of a dict: an object if its names are strings (no `name`), else a list of pairs."""
    if name is not None:
        pairs = _items(list, _fixed(tuple, tuple, [name, item]))
        return Converter(
            lambda each: pairs.encode(list(expect(dict, each).items())), lambda each: dict(pairs.decode(each))
        )
    text = SCALARS[str]

    def encode(value: Any) -> dict[str, Any]:
        return {text.encode(key): item.encode(each) for key, each in expect(dict, value).items()}

    def decode(value: Any) -> dict[str, Any]:
        return {key: item.decode(each) for key, each in fit(dict, value).items()}

    return Converter(encode, decode)


def _optional(inner: Converter) -> Converter:
    return Converter(
        lambda value: None if value is None else inner.encode(value),
        lambda value: None if value is None else inner.decode(value),
    )


def _tagged(members: dict[str, Converter], *, optional: bool) -> Converter:
    def encode(value: Any) -> list[Any]:
        for name, member in members.items():
            try:
                return [name, member.encode(value)]
            except Unencodable:
                continue
        raise Unencodable(f"{name_of(type(value))} is no member of the annotated union")

    def decode(value: Any) -> Any:
        name, inner = fit(list, value)
        return members[name].decode(inner)

    converter = Converter(encode, decode)
    return _optional(converter) if optional else converter


def _literal(values: tuple[Any, ...]) -> Converter:
    by_name = {repr(each): each for each in values}

    def encode(value: Any) -> str:
        # The type matters too, since 1 == True.
        for name, each in by_name.items():
            if type(each) is type(value) and each == value:
                return name
        raise Unencodable("the result is none of the annotated literals")

    return Converter(encode, by_name.__getitem__)


def _enum(kind: type[Enum]) -> Converter:
    """Return the converter of an enumeration, by name; of flags by number, since a combination has no name."""
    if issubclass(kind, Flag):
        return as_text(kind, lambda value: str(int(value.value)), lambda text: kind(int(text)))

    return as_text(kind, lambda value: str(value.name), lambda text: kind[text])


def _typed_dict(kind: Any, members: dict[str, Converter]) -> Converter:
    required: frozenset[str] = kind.__required_keys__

    def encode(value: Any) -> dict[str, Any]:
        expect(dict, value)
        if not required <= value.keys() <= members.keys():
            raise Unencodable(f"the names of the dict are not those of {name_of(kind)}")
        return {name: members[name].encode(each) for name, each in value.items()}

    def decode(value: Any) -> dict[str, Any]:
        decoded = {name: members[name].decode(each) for name, each in fit(dict, value).items() if name in members}
        if not required <= decoded.keys():
            raise Unfit(f"a name of {name_of(kind)} is missing")
        return decoded

    return Converter(encode, decode)


def _dataclass(kind: Any, members: dict[str, Converter]) -> Converter:
    """Return the converter of a dataclass.

    A field that was added later has its default; a field that was removed is ignored. The constructor is called, and
    then every stored field is set, so that the changes of `__post_init__` are not made twice.
    """
    own: tuple[Field[Any], ...] = fields(kind)

    def encode(value: Any) -> dict[str, Any]:
        expect(kind, value)
        return {name: member.encode(getattr(value, name)) for name, member in members.items()}

    def decode(value: Any) -> Any:
        stored = {name: members[name].decode(each) for name, each in fit(dict, value).items() if name in members}
        missing = [field.name for field in own if field.name not in stored and not _has_default(field)]
        if missing:
            raise Unfit(f"fields of {name_of(kind)} are missing")
        made = kind(**{field.name: stored[field.name] for field in own if field.init and field.name in stored})
        for name, each in stored.items():
            object.__setattr__(made, name, each)
        return made

    return Converter(encode, decode)


def _has_default(field: Field[Any]) -> bool:
    return not field.init or field.default is not MISSING or field.default_factory is not MISSING


def _unsupported(annotation: object) -> ConfigurationError:
    kind = "The type variable" if isinstance(annotation, TypeVar) else "The annotation"
    return ConfigurationError(
        f"{kind} {name_of(annotation)} has no codec; annotate with JSON types, dataclasses, TypedDict, dates, Decimal, "
        "UUID, bytes or Enum, or pass codec=."
    )
