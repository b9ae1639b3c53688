"""The leash: the host waits for the layer so many before, and for nothing else."""

from launch.leash import Leash


class Device:
    """Remembers what was recorded and what was waited for, by number of the mark."""

    def __init__(self):
        self.recorded, self.waited = [], []

    def event(self):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device, self.at = device, None

    def record(self):
        self.at = len(self.device.recorded)
        self.device.recorded.append(self)

    def synchronize(self):
        self.device.waited.append(self.at)


def test_the_host_is_never_further_ahead():
    device = Device()
    leash = Leash(device.event, ahead=3)
    for layer in range(10):
        leash.layer()
        assert len(device.recorded) == layer + 1
        assert device.waited == list(range(max(0, layer - 2)))  # of layer 3 on: layer - 3 is computed
    assert len(set(map(id, device.recorded))) == 3  # used again and again


def test_without_a_device_there_is_nothing_to_wait_for():
    leash = Leash(None)
    for _ in range(10):
        leash.layer()
