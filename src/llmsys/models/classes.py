"""Changing the class of a module in place, to a subclass that passes for the class it is made of.

A class made at run time carries the plain one's name: so FSDP's auto-wrap, which looks for a block by that name, and
what writes it to a file (`architectures` of transformers) find what they know. No import leads to it then, so its
objects are pickled by how it was made.
"""

from __future__ import annotations

import copyreg
import types
from collections.abc import Callable
from typing import Any


def derived(maker: Callable[..., type], *args: Any, bases: tuple[type, ...], **members: Any) -> type:
    """A subclass of `bases`, named as the last of them. `maker`, a function of a module, makes it of `args`."""
    plain = bases[-1]
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, bases, {**names, "__reduce_ex__": _reduce, "_made": (maker, *args), **members})


def become(module: Any, cls: type) -> None:
    """Makes `module` an object of `cls`, in place, also where accelerate's hooks have kept its forward pass.

    ValueError where something else has put a forward pass of its own into the module.
    """
    refuse_patched(module)
    own, method = vars(module), types.MethodType(cls.forward, module)  # type: ignore[attr-defined]
    module.__class__ = cls
    if "_old_forward" in own:
        own["_old_forward"] = method
    else:
        own.pop("forward", None)  # what removed hooks have left


def refuse_patched(module: Any) -> None:
    """ValueError where the module's class does not say what its forward pass is: a change of it would do nothing."""
    if is_patched(module):
        kind = type(module).__name__
        raise ValueError(f"the `forward` of this {kind} has been replaced on the object; do that afterwards")


def is_patched(module: Any) -> bool:
    """Whether the object has a forward pass that is neither its class's nor accelerate's around that."""
    own = vars(module)
    if "forward" not in own:
        return False
    within = own["_old_forward"] if "_hf_hook" in own and "_old_forward" in own else own["forward"]
    method = types.MethodType(type(module).forward, module)
    return bool(within != method)


def _reduce(self: Any, protocol: int) -> Any:
    found: Any = object.__reduce_ex__(self, max(protocol, 2))
    if "_made" not in vars(type(self)) or found[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return found
    return (_new, (_recipe(type(self)),), *found[2:])


def _recipe(cls: Any) -> Any:
    """How a class is made: of classes that can be pickled by their names."""
    made = vars(cls).get("_made")
    return cls if made is None else tuple(_recipe(part) if isinstance(part, type) else part for part in made)


def _class(recipe: Any) -> Any:
    if not isinstance(recipe, tuple):
        return recipe
    maker, *args = recipe
    return maker(*map(_class, args))


def _new(recipe: Any) -> Any:
    cls = _class(recipe)
    return cls.__new__(cls)
