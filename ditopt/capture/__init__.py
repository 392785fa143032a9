"""From a live model and one call to a Program.

``spec`` says how a call maps to flat tensors and back. ``chain`` tries the ways of capture in order: it exports a copy
of the model (the live one is not touched, its weights are shared by handle), functionalises it with a decomposition
table that keeps attention, norms, linears and activations whole, and checks the graph against the model on a second,
derived input. ``opened`` takes arguments apart that are objects, and knows what a model writes into them. ``replay``
and ``guard`` serve models whose Python looks at values of the prompt; where it looks at the latent or the timestep,
modules stay Python inside the graph (``outside``) or forward does around a graph of its blocks (``blockwise``, with
``observe``, ``segment`` and ``deferred``). Passes that look at positions are ``watched``. ``captures`` keeps what one
model's signatures have in common: from the third shape on they come from one graph (``dynamic``).

``aten`` inventory: ``run_decompositions({})`` (torch 2.11-2.13) functionalises and keeps composite operators, and puts
the operators of autocast regions in their place with the casts that they imply; the default table would turn each
attention into softmax and matmuls.
"""

from ditopt.capture.captures import Captures
from ditopt.capture.chain import capture
from ditopt.capture.check import derive
from ditopt.capture.deferred import Off, writes
from ditopt.capture.flat import shared_copy
from ditopt.capture.guard import Guard
from ditopt.capture.held import held
from ditopt.capture.job import Captured
from ditopt.capture.seal import seal
from ditopt.capture.spec import CallSpec, arguments_of, bind, by_name
from ditopt.capture.watched import watched

__all__ = [
    "CallSpec",
    "Captured",
    "Captures",
    "Guard",
    "Off",
    "arguments_of",
    "bind",
    "by_name",
    "capture",
    "derive",
    "held",
    "seal",
    "shared_copy",
    "watched",
    "writes",
]
