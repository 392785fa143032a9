"""Find the blocks and give equal ones one shared body.

The structure is discovered from the graph (ir/structure.py): no module path, class or argument name is read, except
that module paths, where the capture has them, become aliases for display. Blocks that differ only in their weights
become calls of one Function, so text, compile time and later passes see each class of blocks once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from ditopt.ir import example
from ditopt.ir.binding import bind
from ditopt.ir.edit import Editor
from ditopt.ir.outline import flatten, outline
from ditopt.ir.program import Program, Region
from ditopt.ir.structure import find_blocks, find_modules
from ditopt.pipeline import Context, Outcome, Pass


@dataclass(frozen=True)
class OutlineBlocks(Pass):
    """Discover blocks, stages and modules; share one body among blocks that are equal up to their weights."""

    contract = "exact"
    requires = ("canonicalize",)

    def run(self, program: Program, context: Context) -> Outcome:
        if program.blocks():
            return Outcome(program, 0, (f"the {len(program.blocks())} blocks are outlined already",))
        blocks = find_blocks(program.step, bind(program))
        if not blocks:
            return Outcome(program, 0, ("no stretch of the graph repeats: the model has no two equal blocks in a row",))
        regions = [Region("model", "model", "")]
        regions += [Region(f"stage.{s}", "stage", "model", s) for s in sorted({b.stage for b in blocks})]
        with Editor(program.step, self.name) as e:
            for i, block in enumerate(blocks):
                for node in block.nodes:
                    e[node].meta["region"] = f"blocks.{i}"
                stage = block.stage
                regions.append(Region(f"blocks.{i}", "block", f"stage.{stage}", stage, alias=_alias(block.nodes)))
        marked = program.replace(functions={**program.functions, program.entry: e.function()}, regions=tuple(regions))
        named = _mark_modules(outline(marked, self.name), self.name)
        return Outcome(outline(flatten(named), self.name), len(blocks))

    @classmethod
    def example_applies(cls) -> Program:
        return example.tiny_dit()

    @classmethod
    def example_refuses(cls) -> Program:
        return example.tiny_dit(attention=False)


def _alias(nodes: Sequence[fx.Node]) -> str:
    """The module path that most of a block's nodes share, where the capture knew one."""
    paths = [str(n.meta["path"]).split(".") for n in nodes if n.meta.get("path")]
    shared: list[str] = []
    for part in zip(*(p for p in paths if p[:1] == paths[-1][:1]), strict=False):
        if len(set(part)) > 1:
            break
        shared.append(part[0])
    return ".".join(shared)


def _mark_modules(program: Program, origin: str) -> Program:
    """Mark attention and MLP branches inside each body, and list them among the regions of every block."""
    binding = bind(program)
    functions, roles = dict(program.functions), {}
    for name in {r.function for r in program.blocks()}:
        modules = find_modules(program.functions[name], binding)
        with Editor(program.functions[name], origin) as e:
            for module in modules:
                for node in module.nodes:
                    e[node].meta["region"] = f".{module.role}"
        functions[name] = e.function()
        roles[name] = list(dict.fromkeys(m.role for m in modules))
    regions: list[Region] = []
    for r in program.regions:
        regions.append(r)
        regions += [Region(f"{r.id}.{role}", role, r.id, r.stage) for role in roles.get(r.function, [])]  # type: ignore[arg-type]
    return program.replace(functions=functions, regions=tuple(regions))
