"""Said once for all tests, before anything else is imported."""

import gc
import os


def pytest_configure(config):
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # the process that hands tests to others runs none, and torch takes it seconds
    import torch

    # Test processes run side by side: more threads than one each would wait for each other (seen: 91 s, not 0.6 s).
    torch.set_num_threads(1)

    # Where there is no CUDA, Triton kernels run in its interpreter; it reads this when triton is first imported.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish(session):
    """What is loaded by now stays: each full collection of garbage would look through it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    gc.unfreeze()
