"""What a manifest says of decisions comes back from its text."""

from __future__ import annotations

import math

import pytest

from ditopt.artifact import Manifest, from_json, to_json
from ditopt.errors import ArtifactError
from ditopt.ir.program import Decision, Interval, Predictor, Rule

RULES = [
    None,
    Rule("s"),
    Rule("s", limit=math.inf, budget=math.inf),
    Rule("s", "sum", 0.2, polynomial=(1.5, 0.0), domain=(-math.inf, math.inf), since="other", need="n", room=0.5),
    Rule("s", "book", book=((0.03, 12.0), (math.inf, 3.0)), longest=2, slots=("a", "b"), predictor=Predictor("hold")),
]


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    decision = Decision("cache0", ("blocks.0",), Interval(3, 2), Predictor(), (("slot",),), "", rule=rule, needs=("x",))
    manifest = Manifest((), ("y",), (), (decision,), (), ())
    (found,) = from_json(to_json(manifest)).decisions
    assert found == decision


def test_a_rule_whose_limit_is_no_number():
    manifest = Manifest((), ("y",), (), (Decision("c", (), Interval(2), Predictor(), (), "", rule=Rule("s")),), (), ())
    with pytest.raises(ArtifactError, match="damaged"):
        from_json(to_json(manifest).replace('"limit": 0.0', '"limit": "far"'))
