"""Region selectors: which part of a model an option means, as text that fits every model.

    model                        everything
    blocks  blocks.3  blocks.1:-1  blocks.10%:90%      one run of consecutive blocks
    stage.0                      the run of isomorphic blocks number 0
    blocks.*.attn  blocks.1:-1.mlp  stage.1.attn       one module inside each of those blocks
    blocks.*.attn.cross          its attention of one kind: self, joint, cross, temporal or spatial
    a|b                          alternatives, each one selection

Each attention is of one kind, found in the graph (ir/sites.py): ``self`` is that of a stream's tokens to each other,
or of video models whose attention mixes some axes at a time, ``temporal`` that along the frames and ``spatial`` that
inside them; ``cross`` reads another stream, ``joint`` several with the own one. ``attn`` is all of them.

Slices are Python's, except that ``-0`` is the end (``blocks.8:-0`` leaves no block out at the end); a fraction is of
the number of blocks, rounded to the nearest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from ditopt.errors import RecipeError
from ditopt.ir.program import Program, Region
from ditopt.ir.sites import Kind

_ROLES = ("attn", "mlp")
_ALTERNATIVE = re.compile(
    r"(?:(?P<head>blocks|stage)(?:\.(?P<index>\*|[-\d:%]+))?(?:\.(?P<role>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?))?)$"
)


@dataclass(frozen=True)
class Selection:
    """What one alternative selects: everything, a run of consecutive blocks, or one module in each of some blocks.

    ``blocks`` in order of the main chain, empty for "model"; ``role`` is that of the modules, else "".
    """

    kind: Literal["model", "run", "modules"]
    blocks: tuple[Region, ...] = ()
    role: str = ""

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the regions that are selected."""
        if self.kind == "model":
            return ("model",)
        return tuple(f"{b.id}.{self.role}" if self.role else b.id for b in self.blocks)


def select_regions(program: Program, text: str) -> list[Selection]:
    """The selections that ``text`` makes in ``program``, one for each alternative; some may be of nothing (a model need
    not have all roles). RecipeError where one is malformed or all match nothing; it says what the model has."""
    selections = [_select(program, alternative.strip()) for alternative in text.split("|")]
    if not any(s.ids for s in selections):
        raise RecipeError(f"region {text!r} matches nothing; {_what_there_is(program)}")
    return selections


def lacking(program: Program, text: str) -> str:
    """A sentence where ``text`` asks for nothing but kinds of attention that no block has; else ""."""
    found = [_ALTERNATIVE.match(alternative.strip()) for alternative in text.split("|")]
    asked = [m["role"].removeprefix("attn.") for m in found if m and (m["role"] or "").startswith("attn.")]
    there = kinds_of(program)
    if len(asked) < len(found) or not there or any(a in there or a not in get_args(Kind) for a in asked):
        return ""
    return f"no attention of this model is {' or '.join(asked)}; there is {', '.join(there)}"


def _select(program: Program, text: str) -> Selection:
    if text == "model":
        return Selection("model")
    match = _ALTERNATIVE.match(text)
    if match is None:
        raise RecipeError(f"region {text!r} is not a selector; {_what_there_is(program)}")
    index, role = match["index"], match["role"] or ""
    if index == "*" and not role:
        raise RecipeError(f"region {text!r}: write 'blocks' for all of them, or a role as in 'blocks.*.attn'")
    if match["head"] == "stage":
        if index is None or not index.isdigit():
            raise RecipeError(f"region {text!r}: a stage is chosen by its number, as in 'stage.0'")
        blocks = [b for b in program.blocks() if b.stage == int(index)]
    else:
        blocks = _slice(text, program.blocks(), index or "*")
    if role:
        blocks = [b for b in blocks if f"{b.id}.{role}" in _ids(program)]
    return Selection("modules" if role else "run", tuple(blocks), role)


def _slice(text: str, blocks: list[Region], index: str) -> list[Region]:
    parts = index.split(":")
    bad = RecipeError(f"region {text!r}: {index!r} is not a block number or a slice such as 1:-1 or 10%:90%")
    if len(parts) > 2 or not all(re.fullmatch(r"\*|-?\d+%?|", p) for p in parts):
        raise bad
    if parts == ["*"]:
        return blocks
    if "*" in parts or (len(parts) == 1 and not re.fullmatch(r"-?\d+", index)):
        raise bad
    n = len(blocks)
    if len(parts) == 1:
        at = int(index) + (n if index.startswith("-") else 0)
        return blocks[at : at + 1] if 0 <= at < n else []

    def bound(part: str) -> int | None:
        if not part:
            return None
        size = part.removeprefix("-")
        at = int(size.removesuffix("%"))
        if size.endswith("%"):
            at = (2 * n * at + 100) // 200  # rounds half up; round() would round half to even
        return max(n - at, 0) if part.startswith("-") else at

    return blocks[slice(*map(bound, parts))]


def kinds_of(program: Program) -> list[str]:
    """The kinds of attention in the blocks, in the order of ``Kind``."""
    found = {r.role for r in program.regions if r.parent.endswith(".attn")}
    return [kind for kind in get_args(Kind) if kind in found]


def _ids(program: Program) -> set[str]:
    return {r.id for r in program.regions}


def _what_there_is(program: Program) -> str:
    blocks = program.blocks()
    if not blocks:
        return (
            "no repeated blocks were found in this model, so only 'model' can be selected (outline_blocks finds them)"
        )
    there = _ids(program)
    roles = [r for r in _ROLES if any(f"{b.id}.{r}" in there for b in blocks)]
    kinds = kinds_of(program)
    listed = [f"{r} ({', '.join(kinds)})" if r == "attn" and kinds else r for r in roles]
    stages = sorted({b.stage for b in blocks if b.stage >= 0})
    inside = f"roles {', '.join(listed)} inside them" if roles else "no attn or mlp found inside them"
    examples = ["blocks", f"blocks.1:-1{'.' + roles[0] if roles else ''}" if len(blocks) > 2 else "blocks.0"]
    return (
        f"the model has {len(blocks)} block{'s' if len(blocks) > 1 else ''} ({blocks[0].id} to {blocks[-1].id}), "
        f"{len(stages)} stage{'s' if len(stages) != 1 else ''}, {inside}; try {' or '.join(map(repr, examples))}"
    )
