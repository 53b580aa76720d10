"""Which backend serves a call.

Every operator has a table of ways to compute it, one or several for each backend, each with a function that says
*why* it cannot serve a call. A call goes to the first way that serves it, in the order of :data:`BACKENDS`, or of
those of the backend forced by the ``backend`` argument or the environment variable ``G2G_BACKEND``. The log names each
backend once; operators are at debug level, and at info level where a faster way was refused.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from itertools import groupby
from operator import itemgetter
from types import ModuleType
from typing import Any, NamedTuple

from g2g_kernels.tracing import constant_when_traced, is_traced

logger = logging.getLogger("g2g_kernels")


class BackendError(RuntimeError):
    """No backend, or not the requested one, can serve a call; the message lists every reason."""


def _nothing() -> None:
    return None


class Backend(NamedTuple):
    """A backend, except for its operators.

    Attributes:
        name: what the argument ``backend`` calls it.
        unavailable: why it is unavailable on this machine, or None if it is available.
        preference: backends with a higher one are asked first. The compiled ones have 20 and 30, ``"torch"`` 0.
        only_by_name: why a call must request it by name, or None if it need not.
        device_type: of the tensors that it serves; None: any.
        package: the Python package that it needs besides PyTorch, or None.
        detail: further information, if it is available.
        title: what the log calls it; the name if empty.
    """

    name: str
    unavailable: Callable[[], str | None] = _nothing
    preference: int = 10
    only_by_name: Callable[[], str | None] = _nothing
    device_type: str | None = None
    package: str | None = None
    detail: Callable[[], str | None] = _nothing
    title: str = ""


#: the backends by name, in order of preference (``g2g_kernels.backends`` has those of this library)
BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Adds a backend, or replaces the one of that name."""
    everyone = {**BACKENDS, backend.name: backend}
    BACKENDS.clear()
    BACKENDS.update(sorted(everyone.items(), key=lambda item: -item[1].preference))


def backend_status() -> dict[str, str | None]:
    """Every backend in order of preference, with None if it is available here, otherwise the reason why not.

    Example:
        >>> backend_status()["torch"] is None  # available
        True
    """
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def available_backends() -> list[str]:
    """The backends available on this machine, in order of preference (``"torch"`` always is).

    Example:
        >>> "torch" in available_backends()
        True
    """
    return [name for name, reason in backend_status().items() if reason is None]


@constant_when_traced  # a traced call keeps the backend that was forced then
def _environment() -> str:
    return os.environ.get("G2G_BACKEND", "")


def forced_backend(backend: str | None) -> str | None:
    """The backend of the argument or ``G2G_BACKEND``; None (or ``"auto"``): any. ValueError for an unknown name."""
    source = "backend" if backend is not None else "G2G_BACKEND"
    name = backend if backend is not None else _environment()
    if name in ("", "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is not a backend; choose one of auto, {', '.join(BACKENDS)}")
    return name


def require_backend(backend: str | None) -> None:
    """Raises unless the forced backend, if any, is known and available on this machine."""
    name = forced_backend(backend)
    reason = BACKENDS[name].unavailable() if name else None
    if reason:
        raise BackendError(
            f"backend {name!r} is unavailable here: {reason}; available: {', '.join(available_backends())}"
        )


class Way(NamedTuple):
    """One way to compute an operator.

    Attributes:
        name: what logs and errors call it.
        run: takes the arguments of a call.
        refuses: takes the same, and says why this way cannot serve them, or None.
    """

    name: str
    run: Callable
    refuses: Callable[..., str | None]


class Choice(NamedTuple):
    """Which way serves a call of an operator, and why none of those before it does.

    Attributes:
        operator: its name.
        way: the one that serves.
        reasons: of each way before it, or of a whole backend, by name.
    """

    operator: str
    way: Way
    reasons: dict[str, str]

    def __str__(self) -> str:
        passed_over = [f"  not {each}" for each in listed(self.reasons)]
        return "\n".join([f"{self.operator} runs by {self.way.name}", *passed_over])


def listed(reasons: Mapping[str, str]) -> list[str]:
    """``names: reason`` of each reason, those of neighbours that are equal together."""
    of_names = [([name for name, _ in same], reason) for reason, same in groupby(reasons.items(), key=itemgetter(1))]
    return [f"{', '.join(names)}: {reason}" for names, reason in of_names]


#: the key of ways that call operators of any backend, or of the forced one; they come before those of plain PyTorch
ANY = "any"


class Operator:
    """The table of the ways to compute one operator: those of each backend, in order of preference."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ways: dict[str, tuple[Way, ...]] = {}

    def register(
        self, backend: str, function: Callable, refuses: Callable[..., str | None] | None = None, way: str = ""
    ) -> None:
        """Adds a way behind the others of a backend, or replaces the one of that name (the backend's, if empty);
        ``refuses`` takes the same arguments as the function and says why it cannot serve them, or None."""
        added = Way(way or backend, function, refuses or (lambda *args: None))
        own = {each.name: each for each in self.ways.get(backend, ())} | {added.name: added}
        self.ways[backend] = tuple(own.values())

    def register_module(self, backend: str, load: Callable[[], ModuleType], way: str = "") -> None:
        """Adds a module, imported by ``load`` at the first call: a function of the operator's name, and ``refuses``."""
        self.register(
            backend,
            lambda *args, **kwargs: getattr(load(), self.name)(*args, **kwargs),
            lambda *args: load().refuses(*args),
            way,
        )

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        return self.choose(*args, backend=backend).way.run(*args)

    def in_order(self, forced: str | None = None) -> list[str]:
        """The backends that are asked, :data:`ANY` among them."""
        names = [forced] if forced else [*BACKENDS]
        if ANY not in self.ways:
            return names
        compiled = [name for name in names if BACKENDS[name].preference > 0]
        return [*compiled, ANY, *names[len(compiled) :]]

    def find(self, *args: Any, backend: str | None = None) -> tuple[str | None, Way | None, dict[str, str]]:
        """The first way, of the forced backend if there is one, that serves, and that backend; None: no way does. And
        the reasons of those before it."""
        forced = forced_backend(backend)
        reasons: dict[str, str] = {}
        for name in self.in_order(forced):
            if name != ANY:
                reason = BACKENDS[name].unavailable() or (None if forced else BACKENDS[name].only_by_name())
                if reason or name not in self.ways:
                    reasons[name] = reason or f"has no {self.name}"
                    continue
            for way in self.ways[name]:
                reason = way.refuses(*args)
                if reason is None:
                    return name, way, reasons
                reasons[way.name] = reason
        return None, None, reasons

    def choose(self, *args: Any, backend: str | None = None) -> Choice:
        """What :meth:`find` finds; BackendError with every reason if it finds none. The log says so once."""
        name, way, reasons = self.find(*args, backend=backend)
        if name is None or way is None:
            forced = forced_backend(backend)
            asked = f"backend {forced!r} cannot serve" if forced else "no backend serves"
            if not forced:
                reasons = dict(reversed(reasons.items()))  # what plain PyTorch lacks, the caller has to change
            raise BackendError(f"{asked} this call of {self.name}: {'; '.join(listed(reasons))}")
        if not is_traced():
            _log_choice(self.name, name, way.name, tuple(reasons.items()))
        return Choice(self.name, way, reasons)


@functools.cache
def _log_choice(operator: str, backend: str, way: str, reasons: tuple[tuple[str, str], ...]) -> None:
    passed_over = "; ".join(listed(dict(reasons)))
    logger.debug("%s runs by %s%s", operator, way, f" ({passed_over})" if reasons else "")
    title = way if backend == ANY else BACKENDS[backend].title or backend
    if reasons and (backend == ANY or not BACKENDS[backend].preference):  # the reader may be able to change that
        logger.info("Backend of %s: %s, which is slower (%s)", operator, title, passed_over)
    elif backend != ANY:
        _name_backend(title)


@functools.cache
def _name_backend(title: str) -> None:
    logger.info("Backend: %s", title)
