"""Checks the package's jaxtyping annotations while it is tested, once for each combination of what is passed.

Whether a call keeps to its annotations depends on the types of its arguments and its result, and on the
shapes and dtypes of tensors; what was checked with a combination of these is not checked with the same
again. Checks of every call, and of functions within functions built at every call, took two thirds of the
time of the tests that compress a model.
"""

import dataclasses
import functools
import inspect
import types

import jaxtyping
import torch

_LONGEST = 64  # of texts that are told apart


def install(package: str) -> None:
    """Check the annotations of all modules of the package that are imported from now on."""
    jaxtyping.install_import_hook(package, "beartype.beartype")
    checks = {}
    jaxtyping.jaxtyped = functools.partial(_checked, jaxtyping.jaxtyped, checks)


def _checked(jaxtyped, checks, fn=None, *, typechecker):
    """In place of `jaxtyped`, which the import hook puts before every function and class."""
    if fn is None:
        return functools.partial(_checked, jaxtyped, checks, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = _checked(jaxtyped, checks, fn.__init__, typechecker=typechecker)
        return fn
    assert inspect.isfunction(fn), fn
    code = id(
        fn.__code__
    )  # one for all that a function within a function becomes; equal ones may differ in types

    @functools.wraps(fn)
    def once(*args, **kwargs):
        check = checks.get(code)
        if check is None:  # not before the first call: building takes longer than importing
            check = checks[code] = Checks(functools.partial(jaxtyped, typechecker=typechecker), fn)
        try:
            given = (*map(looks, args), *kwargs, *map(looks, kwargs.values()))
        except Unknown:
            given = None
        if given not in check.passed:
            check.arguments(*args, **kwargs)
            check.remember(given)
        result = fn(*args, **kwargs)
        try:
            whole = None if given is None else (given, looks(result))
        except Unknown:
            whole = None
        if whole not in check.passed:
            check.results.append(result)
            check.result(*args, **kwargs)
            check.remember(whole)
        return result

    return once


class Checks:
    """The checks of one function, and the combinations that have passed them."""

    def __init__(self, jaxtyped, fn):
        signature = inspect.signature(fn)
        self.code = fn.__code__  # kept, or another could get its place
        self.results = []
        self.passed = set()
        self.arguments = jaxtyped(self._like(fn, signature.replace(return_annotation=signature.empty)))
        self.result = jaxtyped(self._like(fn, signature))

    def _like(self, fn, signature):
        """A function of that signature and of the module of `fn`, which returns the latest of the results."""

        def latest(*args, **kwargs):
            return self.results.pop() if self.results else None

        like = types.FunctionType(latest.__code__, fn.__globals__, fn.__name__, closure=latest.__closure__)
        like.__signature__ = signature
        like.__qualname__, like.__module__ = fn.__qualname__, fn.__module__
        return like

    def remember(self, combination):
        if combination is not None:
            self.passed.add(combination)


class Unknown(Exception):  # noqa: N818
    """Two values that look alike may differ in what annotations ask for."""


PLAIN: set[type] = set()  # types of which any two values look alike


def looks(value):
    """What annotations can ask for, hashable; Unknown if it is not known."""
    kind = type(value)
    if kind in PLAIN:
        return kind
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return kind, value.dtype, value.shape
    if kind is str:
        return kind, value if len(value) <= _LONGEST else None
    if kind in (tuple, list):
        return kind, len(value), _alike(value)
    if kind is dict:
        return kind, _alike(value), _alike(value.values())
    if kind is type:
        return kind, value
    if isinstance(value, torch.Tensor | tuple | list | dict | set | frozenset):
        raise Unknown  # tensors without sizes, and containers whose items are not looked at
    PLAIN.add(kind)
    return kind


def _alike(items):
    """What all items look like; beartype checks one that it draws, so others must be checked again."""
    kinds = {str if type(item) is str else looks(item) for item in items}
    if len(kinds) > 1:
        raise Unknown
    return frozenset(kinds)
