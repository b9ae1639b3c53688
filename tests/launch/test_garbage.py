"""The garbage collector after the first step: what is there stays out of its sight, and what is garbage has gone."""

from __future__ import annotations

import gc
import weakref

from launch.garbage import Settled


class Node:
    """Part of a circle."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_there_is_not_looked_at_again_until_the_end() -> None:
    gc.unfreeze()  # whatever loaded this process may have frozen it
    node = Node()
    with Settled() as garbage:
        dead = weakref.ref(Node())
        garbage.settle()
        assert dead() is None
        assert gc.get_freeze_count() > 1000
        kept, later = weakref.ref(node), Node()
        del node
        count = gc.get_freeze_count()
        garbage.settle()  # once
        gc.collect()
        assert kept() is not None
        assert gc.get_freeze_count() <= count  # some of it may have gone for good, none was added
        seen = weakref.ref(later)
        del later
        gc.collect()
        assert seen() is None, "younger objects are looked at"
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert kept() is None


def test_what_was_frozen_before_stays_so_but_for_garbage() -> None:
    gc.freeze()
    with Settled() as garbage:
        node = Node()
        garbage.settle()
        kept = weakref.ref(node)
        del node
    assert gc.get_freeze_count() > 1000
    assert kept() is None


def test_without_a_step_nothing_is_settled() -> None:
    gc.freeze()
    try:
        with Settled():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
