"""Arguments that are objects of a class of their own (a cache of keys and values): containers of their attributes.

pytree knows tuples, lists and dicts. An object whose class makes it in no special way is its attributes and nothing
else, so it can be taken apart and made anew from other tensors like those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ditopt._torch import pytree


class Opened:
    """An object taken apart. To pytree it is a container; what pytree makes of it is the object's like, not an
    ``Opened``."""

    def __init__(self, kind: type, attributes: dict[str, Any]) -> None:
        self.kind = kind
        self.attributes = attributes


def opened(value: Any) -> Any:
    """``value`` with each plain object in it, at any depth, as an ``Opened``. Containers are made anew, leaves stay."""
    return _opened(value, ())


def _opened(value: Any, around: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, (Tensor, bool, int, float, str)) or id(value) in around:
        return value  # (an object that holds itself stays a leaf of no known type)
    parts, tree = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
    inside = (*around, id(value))
    if not tree.is_leaf():
        return pytree.tree_unflatten([_opened(part, inside) for part in parts], tree)
    if _is_plain(value):
        return Opened(type(value), {name: _opened(part, inside) for name, part in vars(value).items()})
    return value


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is nothing but its attributes."""
    kind = type(value)
    made_plainly = all(getattr(kind, name) is getattr(object, name) for name in _MAKERS)
    slots = any("__slots__" in vars(k) for k in kind.__mro__)
    return hasattr(value, "__dict__") and made_plainly and not slots and not isinstance(value, nn.Module)


_MAKERS = ("__new__", "__reduce__", "__reduce_ex__")
"""What a class replaces that makes its objects in a way of its own."""


def _attributes(value: Opened) -> tuple[list[Any], tuple[type, tuple[str, ...]]]:
    return list(value.attributes.values()), (value.kind, tuple(value.attributes))


def _named(value: Opened) -> tuple[list[tuple[Any, Any]], tuple[type, tuple[str, ...]]]:
    parts, context = _attributes(value)
    return [(pytree.GetAttrKey(name), part) for name, part in zip(context[1], parts, strict=True)], context


def _made(parts: Iterable[Any], context: tuple[type, Sequence[str]]) -> Any:
    kind, names = context
    made: Any = object.__new__(kind)
    vars(made).update(zip(names, parts, strict=True))
    return made


pytree.register_pytree_node(Opened, _attributes, _made, flatten_with_keys_fn=_named)


Path = tuple[Any, ...]
"""Keys of pytree, from the arguments of a call down to a part of one of them."""


def leaves(arguments: Any) -> dict[Path, Any]:
    """The leaves of arguments, objects taken apart, by path; an empty list or dict is one, too."""
    return dict(pytree.tree_flatten_with_path(opened(arguments), lambda v: isinstance(v, (list, dict)) and not v)[0])


def writes(before: Mapping[Path, Any], arguments: Any) -> tuple[dict[Path, Any], list[Path]]:
    """What a run of a model has put into its ``arguments``, whose leaves were ``before``: values by path, and the paths
    at which something is gone. A change in place of a tensor is none of them: its graph shows it."""
    after = leaves(arguments)
    containers = {path[:i] for path in before for i in range(1, len(path))}
    containers |= {path for path, value in before.items() if isinstance(value, (list, dict))}
    new: dict[Path, Any] = {}
    for path, value in after.items():
        if path not in before or not _same(before[path], value):
            top = next((path[:i] for i in range(2, len(path)) if path[:i] not in containers), path)
            new[top] = at(arguments, top)
    return new, [path for path in before if path not in after and path not in new and path not in containers]


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b))


def at(value: Any, path: Path) -> Any:
    """The part of ``value`` at ``path``."""
    for key in path:
        value = key.get(value)
    return value


def put(arguments: Any, path: Path, value: Any) -> None:
    """Write ``value`` into ``arguments`` at ``path``, as the model does."""
    owner, key = at(arguments, path[:-1]), path[-1]
    if isinstance(key, pytree.GetAttrKey):
        setattr(owner, key.name, value)
    elif isinstance(key, pytree.MappingKey):
        owner[key.key] = value
    elif key.idx == len(owner):
        owner.append(value)
    else:
        owner[key.idx] = value
