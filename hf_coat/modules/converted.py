"""What all converted modules share: they are the user's own modules with another class, and can be turned back."""

import functools
import inspect

from torch import nn

from ..config import CoatConfig, Region


class Converted:
    """Mixin of classes that a live module's class is changed to; see :func:`convert`.

    Attributes:
        coat: The :class:`~hf_coat.config.CoatConfig` in force.
        coat_state: What the conversion found out about the module, and what it needs to run.
        coat_region: The region of a vision-language model that the module is in; see :mod:`hf_coat.policy`.
        coat_original: The class that the module had.
    """

    coat: CoatConfig
    coat_region: Region | None
    coat_original: type[nn.Module]

    def revert(self) -> nn.Module:
        """Undo the conversion exactly and return the module."""
        del self.coat, self.coat_state, self.coat_region
        self.__class__ = self.coat_original
        return self

    def positional(self, args: tuple, kwargs: dict) -> tuple:
        """What the module was called with, in the order of its own forward, which has names of its own for it."""
        if not kwargs:
            return args
        return tuple(inspect.signature(self.coat_original.forward).bind(self, *args, **kwargs).arguments.values())[1:]

    def extra_repr(self) -> str:
        keep = getattr(self.coat_state, "keep", None)  # which adapters do not have
        said = [super().extra_repr(), None if keep is None else f"keeps={keep.value}"]
        said += [] if self.coat_region is None else [f"region={self.coat_region.value}"]
        return ", ".join(filter(None, said))

    def __reduce_ex__(self, protocol):
        # Pickle finds classes by name, which these lack: they are named by what they were made from.
        return _empty, (type(self).__mro__[1], self.coat_original), self.__getstate__()


@functools.cache
def converted_class(mixin: type[Converted], original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``original`` that computes as ``mixin`` says; always the same one for the same two.

    It is named after ``original``, whose name transformers looks at when it initialises weights.
    """
    members = {"coat_original": original, "__module__": mixin.__module__, "__doc__": mixin.__doc__}
    return type(f"Coat{original.__name__}", (mixin, original), members)


def _empty(mixin: type[Converted], original: type[nn.Module]) -> nn.Module:
    cls = converted_class(mixin, original)
    return cls.__new__(cls)


def convert(
    module: nn.Module, mixin: type[Converted], config: CoatConfig, state: object, region: Region | None = None
) -> nn.Module:
    """Change the class of a live module (also one on the meta device) in place and return it.

    Its parameters, their names, ties and hooks, and the module object itself, stay what they were. Doing it again
    replaces its configuration.
    """
    if not isinstance(module, Converted):
        module.__class__ = converted_class(mixin, type(module))
    module.coat, module.coat_state, module.coat_region = config, state, region
    return module
