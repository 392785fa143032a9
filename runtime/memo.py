"""Hoisted values: what does not depend on the latent is computed once and remembered, over steps and over requests.

An entry is found by the bits of the timestep inputs and the content of the other inputs that the memo depends on.
Entries are functions of these and of the weights alone, so they stay right whatever request they were made in, until
``fingerprint`` tells that the weights changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ditopt.artifact import Manifest
from ditopt.errors import SessionError
from ditopt.ir.program import Memo
from ditopt.runtime.same import Known, bits, own, storages, version

PROMPTS = 8
"""Prompts (times guidance branches) that a memo remembers; the least recently used goes first."""

ENTRIES = 4000
"""Entries of one memo: 4 prompts of 1000 steps."""

_SAMPLES = 64


def fingerprint(params: Mapping[str, Tensor]) -> Hashable:
    """What tells changed weights: for each tensor its address, its count of writes, and the integer sum of at most 64
    elements spread over it, which sees the ``.data`` writes (LoRA merges) that the count misses. One host read for
    each device."""
    identities: list[Hashable] = []
    sums: dict[torch.device, list[Tensor]] = {}
    for name in sorted(params):
        tensor = params[name].detach()
        identities.append((name, tensor.data_ptr(), version(params[name]), tensor.shape, tensor.dtype, tensor.device))
        if tensor.is_meta or tensor.numel() == 0:
            continue
        sample = bits(_sample(tensor).contiguous()).to(torch.int64)
        sums.setdefault(tensor.device, []).append(sample.sum())
    contents = tuple(tuple(torch.stack(values).tolist()) for values in sums.values())
    return (tuple(identities), contents)


def _sample(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():  # flattening would copy all of it: thin out each dimension first
        for dim, size in enumerate(tensor.shape):
            tensor = tensor[(slice(None),) * dim + (slice(None, None, max(size // 8, 1)),)]
    flat = tensor.flatten()
    return flat[:: -(-flat.numel() // _SAMPLES)]


class Memos:
    """The remembered values of one plan. ``fills``, ``hits`` and ``drops`` count entries made, found, and forgotten
    because weights changed; ``reads`` host reads: comparisons of inputs, fingerprints."""

    def __init__(self, manifest: Manifest) -> None:
        self.memos = manifest.memos
        self._roles = {i.name: i.role for i in manifest.inputs}
        self.fills = self.hits = self.drops = self.reads = 0
        graphs = {g.name: g for g in manifest.memo_graphs}
        self._params: set[str] = set()
        for memo in self.memos:
            if memo.function not in graphs:
                raise SessionError(
                    f"memo {memo.name!r} needs the graph {memo.function!r}, which the manifest lacks; export again"
                )
            latent = [k for k in memo.keys if self._roles.get(k, "latent") == "latent"]
            if latent:
                raise SessionError(f"memo {memo.name!r} depends on {latent}, which change every step; optimize again")
            self._params |= {f.ref for f in graphs[memo.function].inputs if f.kind == "param"}
        self._seen: Hashable = None
        self._clear()

    def _clear(self) -> None:
        self._groups = {m.name: Known(PROMPTS) for m in self.memos}
        self._entries: dict[str, OrderedDict[tuple[int | None, bytes], list[Tensor]]] = {
            m.name: OrderedDict() for m in self.memos
        }

    def reads_time(self) -> bool:
        """Whether some memo is a table over timesteps."""
        return any(self._roles[k] == "timestep" for m in self.memos for k in m.keys)

    def begin(self, params: Mapping[str, Tensor]) -> bool:
        """A request begins: forget everything if the weights that memos read changed. True if something was."""
        if not self.memos:
            return False
        for known in self._groups.values():
            known.doubt()
        self.reads += 1
        now = fingerprint({name: params[name] for name in self._params if name in params})
        changed, self._seen = self._seen is not None and now != self._seen, now
        if changed:
            lost = sum(len(e) for e in self._entries.values())
            self.drops += lost
            self._clear()
            return lost > 0
        return False

    def find(
        self, memo: Memo, inputs: Mapping[str, Tensor], clock: Mapping[str, bytes]
    ) -> tuple[list[Tensor] | None, int | None]:
        """The values of ``memo`` for the model's ``inputs`` by name and the bits of each timestep input (None where
        they have to be computed), and the number of what these inputs are known by besides their timestep."""
        known, entries = self._groups[memo.name], self._entries[memo.name]
        before = known.reads
        group = known.find([inputs[k] for k in memo.keys if self._roles[k] != "timestep"])
        self.reads += known.reads - before
        key = group, self._time(memo, clock)
        if key not in entries:
            return None, group
        entries.move_to_end(key)
        self.hits += 1
        return entries[key], group

    def add(
        self,
        memo: Memo,
        inputs: Mapping[str, Tensor],
        group: int | None,
        rows: Sequence[tuple[Mapping[str, bytes], Sequence[Tensor]]],
    ) -> tuple[list[Tensor], int]:
        """Remember (clock, values) of each of ``rows``, whose other inputs ``find`` gave ``group`` for; returns the
        values of the first row as they are kept, and the group."""
        known, entries = self._groups[memo.name], self._entries[memo.name]
        # A value that shares memory with an input would change when the caller reuses that memory.
        kept = [own(values, storages(inputs.values())) for _, values in rows]
        if group is None:
            group = known.add([inputs[k] for k in memo.keys if self._roles[k] != "timestep"])
            for key in [k for k in entries if k[0] is None or k[0] not in known]:
                del entries[key]
        entries.update(
            {(group, self._time(memo, clock)): values for (clock, _), values in zip(rows, kept, strict=True)}
        )
        self.fills += len(rows)
        while len(entries) > ENTRIES:
            entries.popitem(last=False)
        return kept[0], group

    def peek(self, memo: Memo, group: int | None, clock: Mapping[str, bytes]) -> list[Tensor] | None:
        """The values of ``memo`` in a row of ``group``, without counting that they were asked for."""
        return self._entries[memo.name].get((group, self._time(memo, clock)))

    def unwatch(self, names: Collection[str]) -> None:
        """These weights are gone; what was computed from them stays right."""
        self._params -= set(names)
        self._seen = None

    def _time(self, memo: Memo, clock: Mapping[str, bytes]) -> bytes:
        return b"".join(clock[k] for k in memo.keys if self._roles[k] == "timestep")
