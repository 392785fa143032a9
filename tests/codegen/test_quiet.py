"""Warnings of torch about what ditopt does not do stay away from users."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import fx

from ditopt._torch import compile_graph

LOG = "torch._inductor.standalone_compile"


def test_that_nothing_can_be_saved_is_not_told(monkeypatch, caplog):
    standalone = pytest.importorskip(LOG)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)
    module = fx.symbolic_trace(lambda x: (x * 2 + 1,))
    x = torch.arange(4.0)
    with caplog.at_level(logging.WARNING, logger=LOG):
        run = compile_graph(module, [x])
        assert not [r for r in caplog.records if "cannot save" in r.getMessage()]
        standalone.log.warning("standalone_compile artifact generation failed, cannot save. Again")
    assert len([r for r in caplog.records if "cannot save" in r.getMessage()]) == 1, "elsewhere it is told"
    assert torch.equal(run(x)[0], x * 2 + 1)
