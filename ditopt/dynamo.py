"""torch.compile(model, backend="ditopt", options={"recipe": ...}).

Dynamo hands over its graph; the compiled callable is a Session around it, so that caches, requests and guidance
branches work as with ``optimize`` and Dynamo sees one graph that never recompiles for a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from ditopt.engine import Engine
from ditopt.errors import BadInput
from ditopt.pacing import refuse_bare
from ditopt.pipeline import suggest
from ditopt.recipe import Recipe

OPTIONS = ("recipe", "steps", "target", "roles")

engines: list[Engine] = []
"""The engines that torch.compile made in this process, newest last: their ``session.stats`` and histories."""


def backend(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **unused: Any
) -> Callable[..., Any]:
    """The Dynamo backend. ``options``: those of ``ditopt.optimize``, by the same names (recipe, steps, target, roles).

    Weights stay arguments of the graph: their values come in with each call, so changes in place are seen.
    """
    given = dict(options or {})
    for name in given:
        if name not in OPTIONS:
            raise BadInput(f"torch.compile option {name!r} is unknown to ditopt; {suggest(name, OPTIONS)}")
    names = [n.target for n in graph.graph.nodes if n.op == "placeholder"]
    weights = [
        n for n, v in zip(names, example_inputs, strict=True) if isinstance(v, nn.Parameter) or _is_stored(str(n))
    ]
    plain = fx.GraphModule(graph, graph.graph)  # Dynamo's own subclass hides the names of its arguments
    recipe = Recipe.parse(given.pop("recipe", "lossless"))
    refuse_bare(recipe, "torch.compile knows none")
    engine = Engine(plain, recipe, weights=[str(w) for w in weights], **given)
    engines.append(engine)

    def run(*args: Any) -> Any:
        return engine(args, {})

    return run


def _is_stored(name: str) -> bool:
    """Dynamo names what it takes from a module by the path it took: a buffer passes through ``_buffers``."""
    return "_parameters_" in name or "_buffers_" in name
