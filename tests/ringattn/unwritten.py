"""For tests: kernels that check who writes first, over memory that is NaN until somebody writes to it."""

from contextlib import contextmanager

import torch

from ringattn.scoring import attention


class Watched:
    """A selective kernel that fails where `fresh_rows` or `fresh_keys` does not say what its memory is like."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getattr__(self, name):
        return getattr(self.kernel, name)

    def forward_(self, *arguments, **options):
        self.watch(self.kernel.forward_, arguments, options, fresh_rows=arguments[7:8])

    def backward_(self, *arguments, **options):
        dq, dk, dv = arguments[10:13]
        return self.watch(self.kernel.backward_, arguments, options, fresh_rows=[dq], fresh_keys=[dk, dv])

    def watch(self, function, arguments, options, **results):
        for flag, tensors in results.items():
            for x in tensors:
                assert bool(x.isnan().all() if options[flag] else not x.isnan().any()), f"{flag}={options[flag]}"
        found = function(*arguments, **options)
        for flag, tensors in results.items():
            assert not any(x.isnan().any() for x in tensors), f"left unwritten, {flag}={options[flag]}"
        return found


@contextmanager
def watched(kernel=None):
    """Selective attention whose new memory is NaN and whose kernels are watched. `kernel`: instead of those picked."""
    pick, before = attention.pick_selective, torch.are_deterministic_algorithms_enabled()
    attention.pick_selective = lambda *arguments: Watched(kernel or pick(*arguments))
    torch.use_deterministic_algorithms(True)  # then torch.empty gives NaN
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        attention.pick_selective = pick
        torch.use_deterministic_algorithms(before)
