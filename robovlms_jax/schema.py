"""Whether values fit the fields of a frozen dataclass: what is refused by name here would otherwise fail far away, as
`'>=' not supported between instances of 'str' and 'int'`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal


@functools.lru_cache
def hints(cls: type) -> dict[str, Any]:
    """Field -> its type, annotations such as `Annotated` left out."""
    known = typing.get_type_hints(cls)
    return {field.name: known[field.name] for field in dataclasses.fields(cls)}


def check(cls: type, values: Mapping[str, Any], path: str = "") -> None:
    """Refuse names that are no fields of `cls`, and values that are not of their field's type.

    Args:
      path: the dotted name of what `values` are of, for messages.
    Raises:
      ValueError: names the field, what it takes and what it was given, or the nearest known field.
    """
    known = hints(cls)
    for name, value in values.items():
        full = f"{path}.{name}" if path else name
        if name not in known:
            hint = nearest(name, known)
            listed = "" if hint.endswith("?") else f" Known: {sorted(known)}."
            raise ValueError(f"{path or cls.__name__} has no field {name!r}{hint}{listed}")
        if not fits(value, known[name]):
            is_choice = typing.get_origin(known[name]) is Literal and isinstance(value, str)
            found = "is not" if is_choice else f"is a {type(value).__name__}; expected"
            raise ValueError(f"{full}={value!r} {found} {describe(known[name])}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """How a message goes on after a name that is not known: "; did you mean ...?", or a full stop."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def checked(path: str) -> Callable[[type], type]:
    """Class decorator, to stand below `dataclass`: an instance's values are checked before its own `__post_init__`."""

    def wrap(cls: type) -> type:
        rest = cls.__dict__.get("__post_init__", lambda self: None)

        def __post_init__(self: Any) -> None:
            check(cls, {field.name: getattr(self, field.name) for field in dataclasses.fields(cls)}, path)
            rest(self)

        cls.__post_init__ = __post_init__
        return cls

    return wrap


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


class Tagged:
    """Base of configurations that stand in a field of their base class and are kept with their registered name.

    Each base has a registry of its own, `class HeadConfig(schema.Tagged, noun="head")`; concrete classes join it with
    what they configure, `@HeadConfig.register("lstm", LSTMHeadConfig)`.
    """

    _noun: ClassVar[str]
    _registry: ClassVar[dict[str, tuple[type, Any]]]

    def __init_subclass__(cls, noun: str = "", **more: Any):
        """noun: what a new base calls one of its kind, for messages. Concrete classes leave it out."""
        super().__init_subclass__(**more)
        if noun:
            cls._noun, cls._registry = noun, {}

    @classmethod
    def register(cls, kind: str, config_type: type) -> Callable[[type], type]:
        """Class decorator for what `config_type` configures. Raises ValueError where the name is taken."""

        def decorate(built: type) -> type:
            if kind in cls._registry:
                raise ValueError(f"{cls._noun} {kind!r} is registered already, by {cls._registry[kind][1].__name__}.")
            cls._registry[kind] = (config_type, built)
            return built

        return decorate

    @classmethod
    def kinds(cls) -> list[str]:
        """All registered names."""
        return sorted(cls._registry)

    @classmethod
    def kind_of(cls, config_type: type) -> str:
        """Registered name of a class. Raises ValueError listing the known names."""
        for kind, (known, _) in cls._registry.items():
            if known is config_type:
                return kind
        raise ValueError(f"{config_type.__name__} belongs to no registered {cls._noun}; registered: {cls.kinds()}.")

    @classmethod
    def config_of(cls, kind: str) -> type:
        """Class of a registered name. Raises ValueError listing the known names."""
        return cls._entry(kind)[0]

    @classmethod
    def built_by(cls, kind: str) -> Any:
        """What the configurations of a registered name configure. Raises as `config_of`."""
        return cls._entry(kind)[1]

    @classmethod
    def _entry(cls, kind: str) -> tuple[type, Any]:
        if kind not in cls._registry:
            known = cls.kinds()
            raise ValueError(
                f"no {cls._noun} {kind!r}{nearest(str(kind), known)} Registered: {', '.join(known)}. One of your own: "
                "import the file that registers it first."
            )
        return cls._registry[kind]


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values. Tagged ones carry their registered name under `kind`."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if hasattr(value, "to_json"):
            value = value.to_json()
        elif dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = [to_dict(item) if dataclasses.is_dataclass(item) else item for item in value]
        out[field.name] = value
    if isinstance(config, Tagged):
        out["kind"] = config.kind_of(type(config))
    return out


def from_dict(cls: type, values: Mapping[str, Any], path: str = "config") -> Any:
    """Inverse of `to_dict`. Raises ValueError naming an unknown field and the nearest known one, or a field whose value
    is of another type than the field's."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}={values!r} is a {type(values).__name__}; expected the fields of {cls.__name__}.")
    values = dict(values)
    if issubclass(cls, Tagged):
        if "kind" not in values:
            raise ValueError(f"{path} has no field 'kind', a registered name; it has {sorted(values)}.")
        kind = values.pop("kind")
        if not isinstance(kind, str):
            raise ValueError(f"{path}.kind={kind!r} is a {type(kind).__name__}; expected one of {cls.kinds()}.")
        cls = cls.config_of(kind)
    known = hints(cls)
    kwargs = {}
    for name, value in values.items():
        kwargs[name] = from_plain(known.get(name), today(cls, name, value), f"{path}.{name}")
    check(cls, kwargs, path)
    return cls(**kwargs)


def today(cls: type, name: str, value: Any) -> Any:
    """A field's value, or what means the same today where it is one that the field had before: classes say so in
    `FORMER`, field -> truth value that it was -> value."""
    former = getattr(cls, "FORMER", {}).get(name, {})
    return former[value] if isinstance(value, bool) and value in former else value


def item_of(hint: Any) -> type | None:
    """The dataclass that a field is a tuple of; None for all other fields."""
    arguments = typing.get_args(hint)
    several = typing.get_origin(hint) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis
    return arguments[0] if several and dataclasses.is_dataclass(arguments[0]) else None


def from_plain(hint: Any, value: Any, path: str) -> Any:
    """A field's value from plain JSON values, where the field's type `hint` has fields of its own; others as they are.
    Raises as `from_dict`."""
    if hasattr(hint, "from_json"):
        return value if isinstance(value, hint) else hint.from_json(value, path)
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path)
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and isinstance(value, Mapping):
        options = [option for option in typing.get_args(hint) if dataclasses.is_dataclass(option)]
        return from_dict(options[0], value, path) if len(options) == 1 else value
    if not isinstance(value, list):
        return value
    item = item_of(hint)
    return tuple(value if item is None else (from_dict(item, x, f"{path}[{i}]") for i, x in enumerate(value)))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value may stand where `hint` is asked for: whole numbers do for float, lists for tuples, paths for
    text; a truth value is no number, and text is neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    plain = origin or hint
    if plain in (int, float):
        number = numbers.Integral if plain is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if plain in (str, pathlib.Path):
        return isinstance(value, (str, pathlib.Path))
    return value is None if plain in (None, type(None)) else isinstance(value, plain)


def describe(hint: Any) -> str:
    """A type as a message shows it: `int`, `one of 'first', 'chunk'`, `tuple[float, ...]`."""
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(hint))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def replaced(config: Any, path: Sequence[str], value: object, above: Sequence[str] = ()) -> Any:
    """A copy of a configuration with one field of it, or of its parts, replaced; above: where the part stands.

    Raises ValueError as `cli.override` does."""
    head, *rest = path
    name = ".".join(above)
    if not dataclasses.is_dataclass(config):
        raise ValueError(f"{name}={config!r} has no fields; {name}.{'.'.join(path)} cannot be set.")
    if rest:
        check(type(config), {head: getattr(config, head, None)}, name)
        value = replaced(getattr(config, head), rest, value, [*above, head])
    value = today(type(config), head, tuple(value) if isinstance(value, list) else value)
    check(type(config), {head: value}, name)
    return dataclasses.replace(config, **{head: value})
