"""Find the blocks and give equal ones one shared body.

The structure is discovered from the graph (ir/structure.py): no module path, class or argument name is read, except
that module paths, where the capture has them, become aliases for display. Blocks that differ only in their weights
become calls of one Function, so text, compile time and later passes see each class of blocks once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ditopt.ir import example
from ditopt.ir.binding import Binding, bind
from ditopt.ir.cost import is_matmul
from ditopt.ir.edit import Editor
from ditopt.ir.outline import outline
from ditopt.ir.positions import with_grids
from ditopt.ir.program import Program, Region
from ditopt.ir.regions import with_modules
from ditopt.ir.structure import Block, find_blocks, find_ends
from ditopt.pipeline import Context, Outcome, Pass


@dataclass(frozen=True)
class OutlineBlocks(Pass):
    """Discover blocks, stages and modules; share one body among blocks that are equal up to their weights."""

    contract = "exact"
    requires = ("canonicalize",)

    def run(self, program: Program, context: Context) -> Outcome:
        if program.blocks():
            return Outcome(program, 0, (f"the {len(program.blocks())} blocks are outlined already",))
        binding = bind(program)
        blocks = find_blocks(program.step, binding)
        if not any(b.chain == 0 for b in blocks):
            return Outcome(program, 0, ("the model has no residual branch that attends, and none that repeats",))
        marked = _mark(program, blocks, binding, self.name)
        outlined = with_modules(outline(marked, self.name), self.name)
        return Outcome(with_grids(outlined, context.given), len(blocks))

    @classmethod
    def example_applies(cls) -> Program:
        return example.tiny_dit()

    @classmethod
    def example_refuses(cls) -> Program:
        return example.tiny_dit(attention=False)


def _mark(program: Program, blocks: Sequence[Block], binding: Mapping[fx.Node, Binding], origin: str) -> Program:
    """``program`` with the region of every operator, and the regions: model, what leads to the blocks, stages with
    their blocks, what follows them, auxiliary chains."""
    ids: dict[int, str] = {}
    count: dict[int, int] = {}
    for k, block in enumerate(blocks):
        chain = f"aux{block.chain - 1}" if block.chain else "blocks"
        ids[k] = f"{chain}.{count.setdefault(block.chain, 0)}"
        count[block.chain] += 1
    embed, head = find_ends(program.step, blocks, binding)
    with Editor(program.step, origin) as e:
        for name, nodes in (("embed", embed), ("head", head), *((ids[k], b.nodes) for k, b in enumerate(blocks))):
            for node in nodes:
                e[node].meta["region"] = name
    regions = [Region("model", "model", "")]
    regions += [Region("embed", "embed", "model")] if embed else []
    regions += [Region(f"stage.{s}", "stage", "model", s) for s in sorted({b.stage for b in blocks if not b.chain})]
    regions += [Region("head", "head", "model")] if head else []
    for k, block in enumerate(blocks):
        role, parent = ("aux", "model") if block.chain else ("block", f"stage.{block.stage}")
        regions.append(Region(ids[k], role, parent, block.stage, alias=_alias(block.nodes)))  # type: ignore[arg-type]
    functions = {**program.functions, program.entry: e.function()}
    return program.replace(functions=functions, regions=tuple(regions))


def _alias(nodes: Sequence[fx.Node]) -> str:
    """The module path that a block's nodes share, where the capture knew one: those that multiply matrices, for what
    lies around them may be of another module (the model's own slice of a table, the norm before)."""
    known = [n for n in nodes if n.meta.get("path")]
    paths = [str(n.meta["path"]).split(".") for n in [n for n in known if is_matmul(n)] or known]
    shared: list[str] = []
    for part in zip(*(p for p in paths if p[:1] == paths[-1][:1]), strict=False):
        if len(set(part)) > 1:
            break
        shared.append(part[0])
    return ".".join(shared)
