"""What is changed for a while is put back, whenever Ctrl-C comes; what stands in for a method stays behind in copies."""

import copy
import os
import pickle
import signal
import threading

import pytest
import torch
from torch import nn

from fasthaw.undo import Standin, Undone


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


class Trace:
    """A change in two steps, with an interrupt in the middle of one of the ways."""

    def __init__(self, at=None):
        self.made, self.at = [], at

    def change(self):
        self.made.append("begun")
        if self.at == "change":
            interrupt()
        self.made.append("done")
        return self

    def back(self):
        if self.at == "back":
            interrupt()
            interrupt()
        self.made.clear()


@pytest.mark.parametrize("at", ["change", "back"])
def test_an_interrupt_on_the_way_in_or_out_waits_until_all_is_put_back(at):
    trace, reached = Trace(at), []
    with pytest.raises(KeyboardInterrupt), Undone(trace.change, trace.back):
        reached.append(True)
    assert trace.made == []
    assert reached == ([] if at == "change" else [True])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_in_the_block_comes_at_once():
    trace, after = Trace(), []
    with pytest.raises(KeyboardInterrupt), Undone(trace.change, trace.back):
        assert trace.made == ["begun", "done"]
        interrupt()
        after.append(True)
    assert (trace.made, after) == ([], [])


def test_a_block_in_the_way_out_of_another_lets_the_other_finish_first():
    outer, inner = Trace(), Trace()

    def back():
        with Undone(inner.change, inner.back):
            interrupt()
        outer.back()

    with pytest.raises(KeyboardInterrupt), Undone(outer.change, back):
        pass
    assert (outer.made, inner.made) == ([], [])


def test_a_change_that_fails_halfway_is_put_back():
    made = []

    def change():
        made.append(1)
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Undone(change, made.clear):
        pass
    assert made == []


def test_a_handler_that_goes_on_is_called_once_and_the_block_runs():
    came, trace = [], Trace("change")
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        with Undone(trace.change, trace.back):
            assert (trace.made, came) == (["begun", "done"], [True])
            interrupt()
        assert (trace.made, came) == ([], [True, True])
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_set_inside_the_block_stays():
    mine = lambda *_: None
    before = signal.getsignal(signal.SIGINT)
    try:
        with Undone(lambda: None, lambda: None):
            signal.signal(signal.SIGINT, mine)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_signals_that_no_function_handles_are_left_alone(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with Undone(lambda: None, lambda: None):
            assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_put_back_as_well():
    trace = Trace()

    def run():
        with Undone(trace.change, trace.back):
            seen.append(list(trace.made))

    seen = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert (seen, trace.made) == ([["begun", "done"]], [])


# The signal of a timer, so that it comes at any moment; `fasthaw.undo` with it in place of SIGINT.
def test_random_moments_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(signal, "SIGINT", signal.SIGALRM)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    generator, hits, made = torch.Generator().manual_seed(0), 0, []
    try:
        for delay in torch.rand(800, generator=generator).tolist():
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + 4e-5 * delay)
                for _ in range(1000):
                    with Undone(lambda: made.append(1), made.clear), Undone(lambda: made.append(2), made.clear):
                        pass
            except KeyboardInterrupt:
                hits += 1
            assert made == []
            assert signal.getsignal(signal.SIGALRM) is signal.default_int_handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits == 800


def test_a_block_is_not_entered_inside_itself_but_again_after_it_was_left():
    trace = Trace()
    block = Undone(trace.change, trace.back)
    for _ in range(2):
        with block:
            assert block.entered
            with pytest.raises(RuntimeError, match="entered already"), block:
                pass
            assert trace.made == ["begun", "done"]
        assert not block.entered and trace.made == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def linear(out=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, out))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_while_something_stands_in_computes_with_its_own_weights(how):
    model = linear()
    one = Standin(model[0], "forward", lambda x: one.real(x) + 1)
    x, clean = torch.ones(1, 3), model(torch.ones(1, 3))
    one.put_in()
    assert torch.equal(model(x), clean + 1)
    copied = COPIES[how](model)
    again = copy.deepcopy(copied)
    one.take_out()
    assert torch.equal(copied(x), clean) and torch.equal(model(x), clean)
    assert not isinstance(vars(copied[0])["forward"], Standin)
    with torch.no_grad():
        copied[0].weight.zero_()
    assert torch.equal(copied(x), copied[0].bias[None]) and torch.equal(model(x), clean)
    assert torch.equal(again(x), clean)
    assert "forward" not in vars(model[0])


def _own(x):
    return x * 2


def test_what_an_object_had_of_its_own_comes_back_and_goes_with_a_copy():
    model = linear()
    model[0].forward = _own
    one = Standin(model[0], "forward", lambda x: x)
    one.put_in()
    copied = copy.deepcopy(model)
    one.take_out()
    one.take_out()
    assert vars(model[0])["forward"] is _own and vars(copied[0])["forward"] is _own


def test_nothing_is_taken_out_that_somebody_else_put_in():
    model = linear()
    one = Standin(model[0], "forward", lambda x: x)
    one.put_in()
    model[0].forward = _own
    one.take_out()
    assert vars(model[0])["forward"] is _own
