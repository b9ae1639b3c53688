"""The trainer's error family and the exit status each error stands for.

The statuses follow sysexits.h where it has a word for the case. They are also written to `status.json`, because
torchrun turns every failure of a worker into status 1. This module imports no torch: a bad configuration is refused
before torch is loaded.
"""

from __future__ import annotations

import sys

EXIT_DONE = 0
EXIT_CONFIG = 64
EXIT_DATA = 65
EXIT_PEER = 69
EXIT_BUG = 70
EXIT_OUT_OF_MEMORY = 71  # what sysexits.h has for what the system could not give, such as a process
EXIT_WRITE = 73
EXIT_PREEMPTED = 75
EXIT_NUMERICS = 76
EXIT_CHECKPOINT = 78


class LaunchError(Exception):
    """Base of all errors that the trainer reports to a user in one readable message, without a traceback.

    Attributes:
        exit_status: What the process ends with.
        everywhere: Whether every rank raises this very error, so that rank 0 alone prints it.
    """

    exit_status: int = EXIT_BUG
    everywhere: bool = False


class ConfigError(LaunchError):
    """The configuration or the command line is wrong. Lists every problem found, one per line."""

    exit_status = EXIT_CONFIG


class DataError(LaunchError):
    """The training data is missing, unreadable or not the data the run began with."""

    exit_status = EXIT_DATA


class PeerLost(LaunchError):
    """Another process of the run died, hangs, or could not be reached."""

    exit_status = EXIT_PEER


class WriteError(LaunchError):
    """Something could not be written, or the run folder belongs to another run."""

    exit_status = EXIT_WRITE


class NumericsError(LaunchError):
    """Too many steps in a row had a non-finite loss or gradient."""

    exit_status = EXIT_NUMERICS


class CheckpointError(LaunchError):
    """No checkpoint can be used: corrupt, of another model, or not loadable at this topology."""

    exit_status = EXIT_CHECKPOINT


class OutOfMemory(LaunchError):
    """A GPU or a host has too little memory for what the run was doing."""

    exit_status = EXIT_OUT_OF_MEMORY


def everywhere(error: LaunchError) -> LaunchError:
    """Mark `error` as one that every rank raises."""
    error.everywhere = True
    return error


def exit_status_of(error: BaseException) -> int:
    """Exit status that `error` ends the process with; 70 (a bug) for anything unexpected."""
    if isinstance(error, LaunchError):
        return error.exit_status
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else EXIT_BUG
    # ringattn imports torch, so its errors are looked up only when it is loaded: else they cannot have been raised.
    ring_errors = sys.modules.get("ringattn.errors")
    if ring_errors is not None:
        if isinstance(error, ring_errors.PeerError):
            return EXIT_PEER
        if isinstance(error, ring_errors.TopologyError):
            return EXIT_CHECKPOINT
    return EXIT_BUG
