"""Calls of the library that are isolated from the settings of Pyro and torch around them, and those
settings from the calls.

Owns `isolated`, for every public function that runs a Pyro program, `plain`,
`tensors_on_cpu`, the seeding of a step, and `normal_numbers`. Next: `checks.py`.

Pyro has one stack of handlers, and torch one default generator, for the whole process. So calls in
several threads take turns, each with an empty stack of handlers. Between the steps of a fit, other
threads have their turn first.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import pyro
import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import Tensor

# seeds of ranks lie an odd number apart, modulo the largest seed
_SEEDS, _BETWEEN_RANKS = 1 << 40, 0x9E3779B97

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class _World:
    """The state of the whole process: Pyro's handlers, plates and settings, and torch's default
    generators.
    """

    handlers: list[Any]
    plates: list[Any]
    settings: dict[str, Any]
    generators: list[Tensor]

    @classmethod
    def now(cls, settings: bool = True) -> _World:
        cards = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(
            list(_PYRO_STACK),
            list(_DIM_ALLOCATOR._stack),
            pyro.settings.get() if settings else {},
            [torch.get_rng_state(), *cards],
        )

    def put(self) -> None:
        """Makes this the state of the process again."""
        self.put_handlers()
        pyro.settings.set(**self.settings)
        self.put_generators()

    def put_handlers(self) -> None:
        _PYRO_STACK[:], _DIM_ALLOCATOR._stack[:] = self.handlers, self.plates

    def put_generators(self) -> None:
        torch.set_rng_state(self.generators[0])
        for number, state in enumerate(self.generators[1:]):
            torch.cuda.set_rng_state(state, number)


class _Turns:
    """A lock that one thread has at a time, as often as it likes (`room`). The others wait for it
    one at a time (`door`).

    Ctrl-C may come just after the lock was taken, so only the lock itself knows its owner.
    """

    def __init__(self) -> None:
        self.process, self.depth = os.getpid(), 0
        self.door, self.room = threading.Lock(), threading.RLock()
        self.outside = _World([], [], {}, [])  # as the owner found it when it came in

    @contextmanager
    def turn(self, settings: bool) -> Iterator[_World]:
        """The state of the process before the turn, with Pyro's `settings` if asked for."""
        # in the child of a fork the thread that has the lock does not run
        if self.process != os.getpid():
            self.__init__()  # type: ignore[misc]
        try:
            self._enter()
            before = _World.now(settings)
            if self.depth == 0:
                self.outside = before
            self.depth += 1
            try:
                yield before
            finally:
                self.depth -= 1
        finally:
            if self._inside() and self.depth == 0:
                self.room.release()

    def _inside(self) -> bool:
        return bool(self.room._is_owned())  # type: ignore[attr-defined]

    def _enter(self) -> None:
        if not self._inside():
            with self.door:
                self.room.acquire()

    def give_way(self) -> None:
        """Lets a waiting thread have its turn, with the state that the owner found, and then
        restores the owner's state.
        """
        if self.door.locked() and self.outside.settings:
            mine, depth = _World.now(), self.depth
            self.outside.put()
            self.depth = 0
            self.room.release()
            interrupt: BaseException | None = None
            while not self._inside():  # cleaning up after Ctrl-C needs a turn as well
                try:
                    self._enter()
                except BaseException as error:
                    interrupt = error
            self.outside, self.depth = _World.now(), depth
            mine.put()
            if interrupt is not None:
                raise interrupt


_TURNS = _Turns()  # one for the process, as the handlers and generators are


@contextmanager
def world(
    *arguments: Any, draws: bool = False, grad: bool = True, steps: bool = False
) -> Iterator[None]:
    """A context without the caller's Pyro handlers and without other threads, with autograd as in a
    plain call. If the caller has set a default device, it is that of the first tensor among the
    arguments.

    Args:
        draws: whether draws change the caller's random state; by default they do not.
        grad: whether autograd is as in a plain call; otherwise as the caller has set it.
        steps: whether `give_way` is called inside.
    """
    with _TURNS.turn(steps) as before, ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(next((t.device for t in _tensors(arguments)), torch.device("cpu")))
        if grad:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
        _World([], [], {}, []).put_handlers()
        try:
            yield
        finally:
            before.put_handlers()
            if not draws:
                (_TURNS.outside if _TURNS.depth == 1 else before).put_generators()


def isolated(
    *, autocast: bool = False, steps: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that calls a function inside `world`, with tensors that autograd can use
    (`plain`), and in full precision unless `autocast`.
    """

    def decorator(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with world(*args, *kwargs.values(), steps=steps), ExitStack() as stack:
                for kind in () if autocast else ("cpu", "cuda"):
                    if torch.is_autocast_enabled(kind):
                        stack.enter_context(torch.autocast(kind, enabled=False))
                named: Any = {name: plain(value) for name, value in kwargs.items()}
                return function(*map(plain, args), **named)

        return call

    return decorator


@contextmanager
def tensors_on_cpu() -> Iterator[None]:
    """A context, or a decorator, in which a tensor without a device is made on the CPU, whatever
    the default is: for code that calls no program or network of a user, or a copy on the CPU.
    """
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


def give_way() -> None:
    """Lets a waiting thread have its turn, and returns with the same state. Call it between the
    steps of a long loop.
    """
    _TURNS.give_way()


def seed_generator(device: torch.device, seed: int) -> None:
    """Seeds the default generator of `device` (torch.manual_seed also records a stack trace per
    call for devices that are not there).
    """
    generator_of(device).manual_seed(seed)


def seed_generators(seed: int) -> None:
    """Seeds the default generators of all devices, as `torch.manual_seed` does, at a hundredth of
    its cost where there is the CPU alone.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def normal_numbers(shape: Sequence[int], seed: int, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal numbers on the CPU that are a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device="cpu")


def seed_of(seed: int, rank: int) -> int:
    """The seed of what the process `rank` of a group draws for itself."""
    return seed if rank == 0 else (seed + rank * _BETWEEN_RANKS) % _SEEDS


def drawing_alike(items: Iterator[T], seed: int) -> Iterator[T]:
    """`items`, whose draws from torch's default generator start at `seed` and go on by themselves:
    a loader shuffles alike in every process, whatever each of them draws in between.
    """
    alike = torch.Generator().manual_seed(seed).get_state()
    while True:
        own = torch.get_rng_state()
        torch.set_rng_state(alike)
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            alike = torch.get_rng_state()
            torch.set_rng_state(own)
        yield item


def generator_of(device: torch.device) -> torch.Generator:
    """The default generator of `device`."""
    return (
        torch.cuda.default_generators[device.index or 0]
        if device.type == "cuda"
        else torch.default_generator
    )


def plain(value: Any) -> Any:
    """A tensor that autograd can use: a copy if it was made in torch.inference_mode. Tuples, lists
    and dicts of tensors too; any other value as it is.
    """
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) is dict:
        return {key: plain(part) for key, part in value.items()}
    return type(value)(map(plain, value)) if type(value) in (tuple, list) else value


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(getattr(value, "x_train", None), Tensor):
            yield value.x_train
        elif hasattr(value, "sites"):
            yield from (
                site.mean
                for site in value.sites.values()
                if isinstance(getattr(site, "mean", None), Tensor)
            )
