"""One Program for each rule of well-formedness: it breaks that rule only, and the error says which and where.

Graphs are edited in place here, which nothing but a test may do.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ditopt._torch import FakeTensorMode
from ditopt.errors import VerifyError
from ditopt.ir.program import Formal, Function, Input, Predictor, Region, Rule, StateSlot, TensorType
from ditopt.ir.verify import verify
from tests.ir.build import Builder, aten, program, sample

SLOT = TensorType(torch.float32, (2, 8))


def node(p, name, function="step"):
    return next(n for n in p.functions[function].graph.nodes if n.name == name)


def output(p, change):
    out = p.step.output
    out.args = (tuple(change(list(out.args[0]))),)
    return p


def with_step(p, **changes):
    return p.replace(functions={**p.functions, "step": dataclasses.replace(p.step, **changes)})


def with_number(p):
    """With a slot that the host can read."""
    return p.replace(state=(*p.state, StateSlot("number", TensorType(torch.float32, (1,)))))


def with_decision(p, **changes):
    return p.replace(decisions=(dataclasses.replace(p.decisions[0], **changes),))


def with_memo(p, **changes):
    return p.replace(memos=(dataclasses.replace(p.memos[0], **changes),))


def with_formal(p, name, kind, ref, function="step"):
    node(p, name, function).meta["formal"] = Formal(kind, ref)
    return p


def with_args(p, name, *args, function="step"):
    node(p, name, function).args = args
    return p


def with_val(p, name, *shape, function="step", **options):
    like = node(p, "hidden_states").meta["val"]
    with like.fake_mode:
        node(p, name, function).meta["val"] = torch.empty(shape, **options)
    return p


def without(p, name, key, function="step"):
    del node(p, name, function).meta[key]
    return p


def with_meta(p, name, key, value):
    node(p, name).meta[key] = value
    return p


def with_target(p, name, target):
    node(p, name).target = target
    return p


def module_call(p):
    with p.step.graph.inserting_before(p.step.output):
        n = p.step.graph.create_node("call_module", "linear", (), {}, "module")
    n.meta = {"val": None, "region": "", "origin": "test"}
    return p


def not_in_order(p):
    add, first = node(p, "add_tensor"), node(p, "getitem")
    add.append(first)
    return p


def nested(p):
    body = p.functions["block0"]
    with body.graph.inserting_before(body.output):
        name = body.graph.get_attr("prompt")
        call = body.graph.call_function(node(p, "invoke_subgraph").target, (name, "prompt", *body.placeholders))
    name.meta = {"val": None, "region": "", "origin": "test"}
    call.meta = {"val": (body.placeholders[0].meta["val"],), "region": "", "origin": "test"}
    return p


def reads_a_name(p):
    name = node(p, "block0")
    node(p, "add_tensor").args = (name, node(p, "prompt_0"))
    return p


def several_modes(p):
    with FakeTensorMode():
        node(p, "prompt_0").meta["val"] = torch.empty(2, 8)
    return p


def state_in_a_body(p):
    body = dataclasses.replace(p.functions["prompt"], state_out=("cache.0",))
    return p.replace(functions={**p.functions, "prompt": body})


def renamed(p):
    return p.replace(functions={**p.functions, "other": p.functions["block0"]})


def regions(*new):
    return lambda p: p.replace(regions=(*p.regions, *new))


RULES = {
    # Tables
    "two inputs": (lambda p: p.replace(inputs=(*p.inputs, p.inputs[0])), "inputs: 'hidden_states' is there twice"),
    "two slots": (lambda p: p.replace(state=(*p.state, p.state[0])), "state: 'cache.0' is there twice"),
    "two memos": (lambda p: p.replace(memos=p.memos * 2), "memos: 'prompt' is there twice"),
    "two decisions": (lambda p: p.replace(decisions=p.decisions * 2), "decisions: 'cache' is there twice"),
    "two regions": (lambda p: p.replace(regions=p.regions * 2), "regions: 'model' is there twice"),
    "no entry": (lambda p: p.replace(entry="stop"), "entry: there is no function 'stop'; there are 'step',"),
    "function name": (renamed, "functions['other']: the function calls itself 'block0'; the two must agree"),
    "identifier": (
        lambda p: p.replace(functions={**p.functions, "a.b": p.functions["block0"]}),
        "functions['a.b']: a function's name must be a Python identifier",
    ),
    "region id": (regions(Region(".mlp", "mlp", "model")), "region '.mlp': an id is made of letters"),
    "region parent": (regions(Region("a", "block", "b")), "region 'a': its parent 'b' does not exist"),
    "region function": (
        regions(Region("a", "block", "model", function="b")),
        "region 'a': its function 'b' does not exist",
    ),
    "region cycle": (
        regions(Region("a", "block", "b"), Region("b", "block", "a")),
        "region 'a': it is its own ancestor",
    ),
    # Decisions
    "decision region": (
        lambda p: with_decision(p, regions=("blocks.7",)),
        "decision 'cache': its region 'blocks.7' does not exist",
    ),
    "decision slot": (
        lambda p: with_decision(p, slots=(("cache.0", "cache.7"),)),
        "decision 'cache': slots[0] names the state slot 'cache.7', which does not exist",
    ),
    "decision order": (
        lambda p: with_decision(p, predictor=Predictor("taylor", 2)),
        "decision 'cache': slots[0] has 2 slots; taylor of order 2 needs 3",
    ),
    "decision slot types": (
        lambda p: with_decision(
            p.replace(state=(*p.state, StateSlot("cache.2", TensorType(torch.float64, (2, 8))))),
            slots=(("cache.0", "cache.2"),),
        ),
        "decision 'cache': slots[0] has slots of different types",
    ),
    "rule slot": (
        lambda p: with_decision(p, rule=Rule("cache.7")),
        "decision 'cache': rule.signal names the state slot 'cache.7', which does not exist",
    ),
    "rule since": (
        lambda p: with_decision(with_number(p), rule=Rule("number", "sum", since="other")),
        "decision 'cache': rule.since='other' is no decision, or its test adds nothing up",
    ),
    "rule since no sum": (
        lambda p: with_decision(with_number(p), rule=Rule("number", "below", since="cache")),
        "decision 'cache': rule.since='cache' is no decision, or its test adds nothing up",
    ),
    "rule need": (
        lambda p: with_decision(with_number(p), rule=Rule("number", need="cache.0")),
        "decision 'cache': rule.need is torch.float32[2, 8], what the host reads is torch.float32[1]",
    ),
    "decision not asked": (
        lambda p: p.replace(decisions=(*p.decisions, dataclasses.replace(p.decisions[0], name="d", weights="w"))),
        "decision 'd': no ditopt.select asks it",
    ),
    "select a decision": (
        lambda p: with_args(p, "select_default_2", *node(p, "select_default_2").args[:2], "other"),
        "step, node select_default_2: it asks the decision 'other', which does not exist",
    ),
    "select by position": (
        lambda p: with_args(p, "select_default_2", node(p, "cache_0")),
        "step, node select_default_2: select takes (computed, predicted, decision) by position",
    ),
    "select types": (
        lambda p: with_args(p, "select_default_2", node(p, "blocks_0_weight"), node(p, "cache_0"), "cache"),
        "step, node select_default_2: select's operands must agree in type",
    ),
    # Metadata
    "val": (lambda p: without(p, "add_tensor", "val"), "step, node add_tensor: its type is unknown"),
    "val of a formal": (
        lambda p: with_meta(p, "prompt_0", "val", (1,)),
        'step, node prompt_0: its type is unknown; expected meta["val"] to be a FakeTensor, found tuple',
    ),
    "val that is a number": (
        lambda p: with_meta(p, "add_tensor", "val", 3),
        "step, node add_tensor: its type is unknown",
    ),
    "val that is real": (
        lambda p: with_meta(p, "add_tensor", "val", torch.zeros(2, 8)),
        "step, node add_tensor: its type is unknown",
    ),
    "val of many": (
        lambda p: with_meta(p, "add_tensor", "val", (node(p, "add_tensor").meta["val"], 3)),
        "or a tuple of them, found tuple",
    ),
    "dtype": (
        lambda p: with_val(p, "add_tensor", 2, 8, dtype=torch.uint1),  # type: ignore[attr-defined]
        "step, node add_tensor: its dtype torch.uint1 has no name in the text",
    ),
    "modes": (several_modes, "step, node prompt_0: its value belongs to another FakeTensorMode"),
    "origin": (
        lambda p: without(p, "add_tensor", "origin"),
        "step, node add_tensor: it does not say which pass made it",
    ),
    "no region": (lambda p: without(p, "add_tensor", "region"), "step, node add_tensor: it has no region"),
    "unknown region": (
        lambda p: with_meta(p, "add_tensor", "region", "blocks.7"),
        "step, node add_tensor: its region 'blocks.7' does not exist",
    ),
    "odd region": (
        lambda p: with_meta(p, "add_tensor", "region", ".a\nb"),
        "step, node add_tensor: its region '.a\\nb' holds more than letters",
    ),
    "formal": (
        lambda p: without(p, "prompt_0", "formal"),
        "step, node prompt_0: a placeholder must say what it stands for",
    ),
    # Nodes
    "node kind": (module_call, "step, node module: the node kind 'call_module' is not allowed"),
    "order": (not_in_order, "step: the graph is not in topological order or is damaged"),
    "python function": (
        lambda p: with_target(p, "add_tensor", torch.add),
        "step, node add_tensor: the target <built-in method add",
    ),
    "namespace": (
        lambda p: with_target(p, "add_tensor", torch.ops.profiler._record_function_enter_new.default),
        "the target profiler._record_function_enter_new.default is no operator of aten, prims, ditopt",
    ),
    "mutation": (
        lambda p: with_target(p, "add_tensor", aten.add_.Tensor),
        "step, node add_tensor: aten.add_.Tensor writes to its operands; a Program is functional",
    ),
    "item": (
        lambda p: with_args(p, "getitem", node(p, "invoke_subgraph"), 1),
        "step, node getitem: it takes an item that does not exist",
    ),
    "item of a tensor": (
        lambda p: with_args(p, "getitem", node(p, "hidden_states"), 0),
        "step, node getitem: it takes an item that does not exist",
    ),
    "item type": (
        lambda p: with_val(p, "getitem", 8, 2),
        "node getitem: the item is torch.float32[2, 8], this node is torch.float32[8, 2]; the types must be equal",
    ),
    "name as a value": (reads_a_name, "step, node block0: a function's name may only stand in a call"),
    # Calls
    "unknown callee": (
        lambda p: with_target(p, "block0", "block7"),
        "step, node block0: it names 'block7', which is no function of the Program",
    ),
    "two callees": (
        lambda p: with_args(p, "invoke_subgraph", node(p, "block0"), "prompt"),
        "step, node invoke_subgraph: a call is invoke_subgraph(",
    ),
    "arity": (
        lambda p: with_args(p, "invoke_subgraph", node(p, "block0"), "block0", node(p, "hidden_states")),
        "step, node invoke_subgraph: block0 takes 2 arguments, the call gives 1",
    ),
    "argument": (
        lambda p: with_args(p, "invoke_subgraph", node(p, "block0"), "block0", node(p, "hidden_states"), 3),
        "step, node invoke_subgraph: argument 1 is 3; expected a node",
    ),
    "argument type": (
        lambda p: with_args(p, "invoke_subgraph", node(p, "block0"), "block0", *[node(p, "hidden_states")] * 2),
        "step, node invoke_subgraph: argument 1 is torch.float32[2, 8], block0's formal is torch.float32[8, 8]",
    ),
    "number of results": (
        lambda p: with_meta(p, "invoke_subgraph", "val", (node(p, "add_tensor").meta["val"],) * 2),
        "step, node invoke_subgraph: block0 has 1 results; expected a tuple of as many types",
    ),
    "result type": (
        lambda p: with_val(p, "add_tensor", 2, 8, dtype=torch.float64, function="block0"),
        "result 0 is torch.float32[2, 8], block0's is torch.float64[2, 8]",
    ),
    "nesting": (nested, "step, node invoke_subgraph: it calls block0, which calls a function itself"),
    "formals of a body": (
        lambda p: with_formal(p, "w", "param", "blocks.0.weight", "block0"),
        "block0, node w: a called function has formals only",
    ),
    "unused function": (
        lambda p: p.replace(functions={**p.functions, "block1": Function("block1", p.functions["block0"].graph)}),
        "block1: nothing calls this function",
    ),
    # Formals
    "kind in the entry": (
        lambda p: with_formal(p, "prompt_0", "formal", "x"),
        "step, node prompt_0: a formal of kind 'formal' is not allowed here; expected 'control', 'input'",
    ),
    "kind in a memo": (
        lambda p: with_formal(p, "const_scale", "state", "cache.0", "prompt"),
        "prompt, node const_scale: a formal of kind 'state' is not allowed here",
    ),
    "twice": (
        lambda p: with_formal(p, "cache_1", "state", "cache.0"),
        "step, node cache_1: another placeholder already stands for the state 'cache.0'",
    ),
    "no input": (lambda p: with_formal(p, "hidden_states", "input", "y"), "node hidden_states: there is no input 'y'"),
    "no param": (lambda p: with_formal(p, "blocks_0_weight", "param", "y"), "there is no param 'y'"),
    "no state": (lambda p: with_formal(p, "cache_0", "state", "y"), "step, node cache_0: there is no state 'y'"),
    "no memo": (lambda p: with_formal(p, "prompt_0", "memo", "y"), "step, node prompt_0: there is no memo 'y'"),
    "no control": (lambda p: with_formal(p, "cache_weights", "control", "y"), "there is no control 'y'"),
    "input type": (
        lambda p: p.replace(inputs=(Input("hidden_states", "latent", TensorType(torch.float32, (2, 9))), p.inputs[1])),
        "step, node hidden_states: it is torch.float32[2, 8], the input 'hidden_states' is torch.float32[2, 9]",
    ),
    "param type": (
        lambda p: p.replace(params={**p.params, "blocks.0.weight": torch.zeros(8, 8, dtype=torch.float64)}),
        "blocks_0_weight: it is torch.float32[8, 8]; the param 'blocks.0.weight' is torch.float64[8, 8]",
    ),
    "control type": (
        lambda p: with_val(p, "cache_weights", 3),
        "step, node cache_weights: it is torch.float32[3], the control 'cache.weights' is torch.float32[2]",
    ),
    "memo type": (
        lambda p: with_val(p, "prompt_0", 2, 8, dtype=torch.float64),
        "step, node prompt_0: it is torch.float64[2, 8], the memo 'prompt.0' is torch.float32[2, 8]",
    ),
    # Results and state
    "results": (lambda p: p.replace(outputs=("a", "b")), "step: it has 1 results; the Program has 2 outputs"),
    "result that is no node": (
        lambda p: output(p, lambda r: [None, *r[1:]]),
        "step, node output: the output must be one flat tuple of nodes that are tensors",
    ),
    "result that is many": (
        lambda p: output(p, lambda r: [node(p, "invoke_subgraph"), *r[1:]]),
        "step, node output: the output must be one flat tuple",
    ),
    "too little state": (
        lambda p: output(p, lambda r: r[:1]),
        "step, node output: it has 1 results and 2 state slots to write",
    ),
    "unknown slot": (
        lambda p: with_step(p, state_out=("cache.0", "cache.7")),
        "step, node output: it writes the state slot 'cache.7', which does not exist",
    ),
    "slot twice": (
        lambda p: with_step(p, state_out=("cache.0", "cache.0")),
        "step, state_out: 'cache.0' is there twice",
    ),
    "slot type": (
        lambda p: output(p, lambda r: [r[0], r[1], node(p, "blocks_0_weight")]),
        "the new value of 'cache.1' is torch.float32[8, 8], the slot is torch.float32[2, 8]",
    ),
    "state elsewhere": (state_in_a_body, "prompt, node output: only the entry writes state"),
    # Memos
    "pace": (lambda p: p.replace(pace=(1.0, 1.5)), "pace: [1.0, 1.5] are no factors from 0 to 1, the first above 0"),
    "pace begins": (lambda p: p.replace(pace=(0.0, 1.0)), "pace: [0.0, 1.0] are no factors"),
    "memo function": (
        lambda p: with_memo(p, function="step"),
        "memo 'prompt': its function 'step' does not exist or is",
    ),
    "memo key": (lambda p: with_memo(p, keys=("y",)), "memo 'prompt': its key 'y' is no input of the model"),
    "memo input": (
        lambda p: with_memo(p, keys=("hidden_states",)),
        "prompt, node text: it reads the input 'text', which is no key of 'prompt'",
    ),
    "memo values": (
        lambda p: with_memo(p, values=("a", "b")),
        "memo 'prompt': it names 2 values; prompt has 1 results",
    ),
    "memo order": (
        lambda p: with_formal(p, "text", "memo", "prompt.0", "prompt"),
        "prompt, node text: there is no memo 'prompt.0'",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    change, says = RULES[rule]
    p = sample()
    verify(p)
    broken = change(p)
    with pytest.raises(VerifyError) as caught:
        verify(broken)
    assert says in str(caught.value)
    str(broken)  # a broken Program can be looked at


def test_strides_are_part_of_a_type():
    mode = FakeTensorMode()
    b = Builder("step", mode)
    p = program(b.function(b.formal("input", "x", 2, 3, stride=(1, 2))))
    verify(p)
    with pytest.raises(VerifyError, match=r"it is torch.float32\[2, 3\] with strides \[1, 2\], the input 'x' is"):
        verify(p.replace(inputs=(Input("x", "latent", TensorType(torch.float32, (2, 3))),)))


def test_strides_of_one_element_are_not():
    b = Builder("step", FakeTensorMode())
    p = program(b.function(b.formal("input", "x", 1, 2, 3, stride=(7, 1, 2))))
    verify(p.replace(inputs=(Input("x", "latent", TensorType(torch.float32, (1, 2, 3), (6, 1, 2))),)))


def test_a_memo_may_read_an_earlier_one_and_call_a_body():
    mode = FakeTensorMode()
    b = Builder("block0", mode)
    body = b.function(b.op(aten.neg.default, b.formal("formal", "x", 2)))
    b = Builder("m0", mode)
    m0 = b.function(*b.call(body, b.formal("input", "t", 2)))
    b = Builder("m1", mode)
    m1 = b.function(b.op(aten.neg.default, b.formal("memo", "m0.0", 2)))
    b = Builder("step", mode)
    step = b.function(b.formal("memo", "m1.0", 2))
    p = sample()
    memos = [dataclasses.replace(p.memos[0], name=m, function=m, keys=("t",), values=(f"{m}.0",)) for m in ("m0", "m1")]
    inputs = [Input("t", "prompt", TensorType(torch.float32, (2,)))]
    functions = {f.name: f for f in (step, m1, m0, body)}
    good = program(step, inputs=inputs, functions=functions, memos=tuple(memos))
    verify(good)
    with pytest.raises(VerifyError, match=r"m1, node m0_0: there is no memo 'm0\.0'"):
        verify(good.replace(memos=tuple(reversed(memos))))
    # m1 is found by its own keys: one that lacks a key of m0 would give the values of another prompt
    stale = (memos[0], dataclasses.replace(memos[1], keys=()))
    with pytest.raises(VerifyError, match=r"m1, node m0_0: it reads 'm0\.0', which changes with t: no key of 'm1'"):
        verify(good.replace(memos=stale))
