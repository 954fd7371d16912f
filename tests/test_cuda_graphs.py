"""The counter by which the host keeps ahead of a device; captures are tested where there is a GPU."""

import pytest
import torch

from whisper_static_cache.cuda_graphs import StepCounter


class Event:
    """Of a device that does a step whenever it is asked whether all is done, and fills the counter late."""

    def __init__(self, counter, queued, visible=True):
        self.counter, self.left, self.visible, self.done = counter, queued, visible, 0

    def record(self, stream):
        pass

    def query(self):
        self.left -= 1
        self.done += 1
        if self.visible or not self.left:
            self.counter.tensor.fill_(self.done)
        return not self.left


@pytest.fixture
def counter():
    return StepCounter(torch.device("cpu"))


def test_without_a_queue_there_is_nothing_to_wait_for(counter):
    counter.restart()
    assert counter.wait(4, ahead=2) is False
    counter.tensor.fill_(-3)
    assert counter.wait(4, ahead=2) is True
    counter.restart()
    assert counter.wait(4, ahead=2) is False


@pytest.mark.parametrize(("ahead", "done"), [(0, 4), (2, 2), (3, 1), (9, 0)])
def test_waits_until_few_steps_are_left(counter, ahead, done):
    counter._event = event = Event(counter, 4)
    assert counter.wait(4, ahead) is False
    assert event.done == done


def test_a_counter_that_shows_late_is_waited_for_no_longer_than_the_queue(counter):
    counter._event = event = Event(counter, 4, visible=False)
    assert counter.wait(4, ahead=2) is False
    assert event.done == 4


def test_an_end_is_not_waited_for_further(counter):
    counter._event = event = Event(counter, 4)
    counter.tensor.fill_(-2)
    assert counter.wait(4, ahead=0) is True
    assert event.done == 0
