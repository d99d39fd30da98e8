"""Changes for the time of a `with` block, put back whenever and however often Ctrl-C comes.

`finally` alone is not enough: an interrupt between a change and its `try`, or inside the `finally`, leaves the change. Here an
interrupt that comes on the way in or out waits until that way is done; inside the block it comes at once.
"""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Callable


class Undone:
    """`with Undone(change, back):` calls `change`, and `back` on leaving; Ctrl-C cuts neither short.

    `back` runs too when `change` fails halfway, so it must do with a change that was made in part. The block's value is what
    `change` returns. Interrupts reach the main thread alone, so in other threads nothing has to wait. A block can be entered
    again after it was left; `entered` tells whether it was.

    Raises:
        RuntimeError: the block is entered inside itself.

    >>> changes = []
    >>> with Undone(lambda: changes.append("in"), lambda: changes.append("out")):
    ...     print(changes)
    ['in']
    >>> changes
    ['in', 'out']
    """

    def __init__(self, change: Callable[[], object], back: Callable[[], object]) -> None:
        self._change, self._back = change, back
        self._before: Callable | None = None  # who handles interrupts outside the block
        self._came = False
        self.entered = False

    def __enter__(self):
        if self.entered:
            raise RuntimeError("this block was entered already and is not left yet")
        self._came = False
        self._take_over()
        self.entered = True
        try:
            value = self._change()
            self._pass_on()
        except BaseException:
            self.__exit__()
            raise
        return value

    def __exit__(self, *exc) -> None:
        try:
            self._back()
        finally:
            self.entered = False
            self._give_back()

    def _take_over(self) -> None:
        before = signal.getsignal(signal.SIGINT)
        # What is no function ignores the signal or ends the process.
        self._before = before if callable(before) and threading.current_thread() is threading.main_thread() else None
        if self._before is not None:
            signal.signal(signal.SIGINT, self._handle)

    def _give_back(self) -> None:
        if self._before is None:
            return
        if signal.getsignal(signal.SIGINT) == self._handle:  # else somebody took over inside the block, and keeps it
            signal.signal(signal.SIGINT, self._before)
        self._pass_on()

    def _pass_on(self) -> None:
        """Let an interrupt through that had to wait."""
        while self._came and self._before is not None:
            self._came = False
            self._before(signal.SIGINT, inspect.currentframe())

    def _handle(self, number: int, frame) -> None:
        # 1. Python runs this between two instructions of the main thread. Whether a way in or out is being walked there, the
        #    stack tells: a flag could not, as an interrupt may come before the first line of `__exit__` that would set it.
        # 2. Inside another block's way out, the handler outside this one finds that frame again, and waits in turn.
        at = frame
        while at is not None:
            if at.f_code in _WAYS:
                self._came = True
                return
            at = at.f_back
        if self._before is not None:
            self._before(number, frame)


_WAYS = {Undone.__enter__.__code__, Undone.__exit__.__code__}


class Standin:
    """A call that stands in an object's own dictionary for one of its methods, and stays behind when the object is copied.

    A closure there would go along: the copy of a module would compute with the weights of the original.
    """

    def __init__(self, owner: object, name: str, call: Callable) -> None:
        self.owner, self.name, self.call = owner, name, call
        self.real = getattr(owner, name)
        self.own = vars(owner).get(name)  # the object's own before; None where the class has the method

    def __call__(self, *args, **kwargs):
        """The call that stands in."""
        return self.call(*args, **kwargs)

    def put_in(self) -> None:
        """Stand in, in place."""
        vars(self.owner)[self.name] = self

    def take_out(self) -> None:
        """Stand in no more: under another one that came later, too; nothing where this one does not stand."""
        over, at = None, vars(self.owner).get(self.name)
        while at is not self:
            if not isinstance(at, Standin):
                return
            over, at = at, at.own
        if over is not None:
            over.own, over.real = self.own, self.real
        elif self.own is None:
            del vars(self.owner)[self.name]
        else:
            vars(self.owner)[self.name] = self.own

    def __reduce__(self) -> tuple:
        # A bound method that is copied or pickled with its owner is that of the copy.
        return as_it_is, (self.real,)


def as_it_is(value):
    """`value`: what a copy or a pickle of a stand-in becomes."""
    return value
