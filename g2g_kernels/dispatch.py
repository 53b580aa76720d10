"""Which backend serves a call.

Every operator registers one implementation per backend, with a function that says *why* it cannot serve a call. A call
goes to the first backend in :data:`BACKENDS` that serves it, or to the one forced by the ``backend`` argument or the
environment variable ``G2G_BACKEND``. The log names each backend once; operators are at debug level.
"""

import functools
import logging
import os
from collections.abc import Callable
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


class Operator:
    """The implementations of one operator, one per backend."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._implementations: dict[str, tuple[Callable, Callable[..., str | None]]] = {}

    def register(self, backend: str, function: Callable, refuses: Callable[..., str | None] | None = None) -> None:
        """Adds an implementation; ``refuses`` takes the same arguments and says why it cannot serve them, or None."""
        self._implementations[backend] = (function, refuses or (lambda *args: None))

    def register_module(self, backend: str, load: Callable[[], ModuleType]) -> None:
        """Adds a module, imported by ``load`` at the first call: a function of the operator's name, and ``refuses``."""
        self.register(
            backend,
            lambda *args, **kwargs: getattr(load(), self.name)(*args, **kwargs),
            lambda *args: load().refuses(*args),
        )

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        return self.choose(*args, backend=backend)(*args)

    def candidates(self) -> tuple[Any, ...]:
        """What a choice depends on besides the call: all backends, their implementations, and the one in force."""
        return *BACKENDS.values(), *self._implementations.items(), _environment()

    def prefers(self, name: str, *args: Any, backend: str | None = None) -> bool:
        """Whether a call goes to the backend ``name``, which is asked first, or is forced to."""
        forced = forced_backend(backend)
        return forced == name if forced else self._refuses(name, args, forced) is None

    def _refuses(self, name: str, args: tuple[Any, ...], forced: str | None) -> str | None:
        """Why a backend does not serve a call, or None."""
        reason = BACKENDS[name].unavailable() or (None if forced else BACKENDS[name].only_by_name())
        if reason:
            return reason
        return self._implementations[name][1](*args) if name in self._implementations else f"has no {self.name}"

    def choose(self, *args: Any, backend: str | None = None) -> Callable:
        """The implementation of the forced or the first backend that serves; BackendError with every reason."""
        forced = forced_backend(backend)
        reasons: dict[str, str] = {}
        for name in (forced,) if forced else BACKENDS:
            reason = self._refuses(name, args, forced)
            if reason is None:
                if not is_traced():
                    _log_choice(self.name, name, tuple(reasons.items()))
                return self._implementations[name][0]
            reasons[name] = reason
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        asked = f"backend {forced!r}" if forced else "no backend"
        raise BackendError(f"{asked} {'cannot serve' if forced else 'serves'} this call of {self.name}: {listed}")


@functools.cache
def _log_choice(operator: str, backend: str, reasons: tuple[tuple[str, str], ...]) -> None:
    passed_over = "; ".join(f"{name}: {reason}" for name, reason in reasons)
    logger.debug("%s runs on backend %s%s", operator, backend, f" ({passed_over})" if reasons else "")
    chosen = BACKENDS[backend]
    if reasons and not chosen.preference:  # nothing faster is left, which the reader may be able to mend
        logger.info("Backend of %s: %s, which is slower (%s)", operator, chosen.title or backend, passed_over)
    else:
        _name_backend(chosen.title or backend)


@functools.cache
def _name_backend(title: str) -> None:
    logger.info("Backend: %s", title)
