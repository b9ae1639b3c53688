"""The probe of the last attention's gradient sees it, and keeps nothing alive that a layer's second run makes."""

import gc
import weakref

import pytest
import torch

import ringattn
from launch.attention import RowAttention
from launch.steps import _GradientProbe
from model.decoder import Decoder
from model.memory import Memory
from tests.model.dense import random_row
from tests.model.kinds import kind


@pytest.mark.parametrize("recompute", [False, True, "keep_attention"])
def test_outputs_are_gone_after_the_backward(recompute):
    config, plan = kind("gqa", layers=3), ringattn.Plan(16, 1)
    module = Decoder(config, Memory(recompute=recompute))
    module.init_weights(0)
    attention, probe, made = RowAttention(plan, None, 0, kernel="auto", carrier=None), _GradientProbe(), []
    watched = probe.watch(attention)

    def noted(*tensors, **options):
        found = watched(*tensors, **options)
        made.append(weakref.ref(found))
        return found

    tokens, labels, positions = random_row(config, 16)
    loss = module(tokens, labels, positions, noted, 8)
    probe.arm()
    attention.recording = False
    loss.backward()
    del loss
    gc.collect()
    assert len(made) == (3 if recompute is False else 6)
    assert [ref() for ref in made] == [None] * len(made)
    assert len(probe._flags) == 1
    assert probe.all_finite()
    assert torch.isfinite(module.embed.weight.grad).all()
