"""What each input of a denoiser is to the loop, inferred and overridable.

The names are those that denoisers use for their arguments; what no name decides is decided by shape, and what shape
does not decide is called latent, because then nothing is assumed not to change. No model class is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import get_args

import torch
from torch import Tensor

from ditopt.errors import BadInput
from ditopt.ir.program import Role

_TIME = re.compile(
    r"(^|_)((?<![xz]_)t|ts|r|time|times|timestep|timesteps|diffusion_steps?|sigma|sigmas|noise_level|noise_labels|c_noise|log_?snr)$"
)
_SHAPE = re.compile(
    r"(^|_)(ids|pos|position|positions|rope|rotary|rotary_emb|freqs|coords|grid|sizes?|shapes?|hw|fps|resolution|aspect_ratio)(_|$)"
)
_PROMPT = re.compile(
    r"(^|_)(encoder|contexts?|cross_?attn|ctx|texts?|txt|prompts?|captions?|cap|cond|conds|global|c|y|class|classes|label|labels|pooled|guidance|clip|t5|style|vector|image_embeds?|meta|vit|camera)(_|$)"
)
_TOKENS = re.compile(r"(^|_)(input|token|prompt|text)_ids$")
"""Numbers of words or of codes, which are no positions."""
_LATENT = re.compile(
    r"(^|_)(hidden_states|x|z|xt|x_t|z_t|img|image|latents?|latent_model_input|sample|noisy|noise|control|controlnet\w*|residuals?|cond_image)$"
)


_AXES = re.compile(r"_[A-Z](_([A-Z][a-z]?|\d))*$")
"""Letters of a tensor's axes at the end of its name: x_B_C_T_H_W, timesteps_B_T, rope_emb_L_1_1_D."""


def words(name: str) -> list[str]:
    """The argument's own name and those of what it is in it (``batch.cond.0``: batch, cond), without the decoration
    that Dynamo gives them and without letters of axes."""
    parts = [part for part in re.split(r"[.\[\]']+", name) if part and not part.isdigit()]
    bare = [re.sub(r"^L_(kwargs_|args_|self_)?", "", part).strip("_") for part in parts]
    return [re.sub(r"_+", "_", _AXES.sub("", part)).lower() for part in bare]


def is_time(name: str) -> bool:
    """Whether an argument of this name is a time of the loop."""
    return _by_name(name) == "timestep"


def infer(
    inputs: Sequence[tuple[str, Tensor]],
    outputs: Sequence[Tensor],
    overrides: Mapping[str, Role] | None = None,
    guess: bool = False,
) -> list[Role]:
    """A role for each (name, tensor). ``overrides`` maps input names to roles; an unknown name or role is BadInput.

    BadInput too where neither name nor shape tells which of several inputs is the time, unless ``guess``: then it is
    the first of them. (No such error for latents: all that could be one are taken for one, which assumes nothing.)
    """
    names = [name for name, _ in inputs]
    for name, role in (overrides or {}).items():
        if name not in names:
            near = get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BadInput(f"roles names the input {name!r}; the model's tensor inputs are {', '.join(names)}{hint}")
        if role not in get_args(Role):
            raise BadInput(f"roles gives {name!r} the role {role!r}; roles are {', '.join(get_args(Role))}")
    told = overrides or {}
    roles = [told.get(name) or _by_name(name) for name in names]
    if "timestep" not in roles:  # unnamed: a vector of one number a row, or a single number
        rows = outputs[0].shape[0] if outputs and outputs[0].ndim else 1
        single = [i for i, (_, v) in enumerate(inputs) if v.ndim <= 1 and v.numel() in (1, rows)]
        times = [i for i in single if roles[i] is None] or [
            # a conditioning of one real number a row, as in forward(x, c)
            i
            for i in single
            if roles[i] == "prompt" and names[i] not in told and inputs[i][1].is_floating_point()
        ]
        if times and not guess:
            _refuse_equals([inputs[i] for i in times])
        for i in times[:1]:
            roles[i] = "timestep"
    if "latent" not in roles:
        shapes = [tuple(o.shape) for o in outputs]
        alike = [i for i, (n, v) in enumerate(inputs) if n not in told and tuple(v.shape) in shapes]
        named = [i for i in alike if roles[i] == "prompt" and inputs[i][1].ndim > 2]  # a grid of numbers, named "c"
        for i in ([i for i in alike if roles[i] is None] or named)[:1]:
            roles[i] = "latent"
    found = "latent" in roles
    return [
        role or ("prompt" if _is_condition(v, found) else "latent") for role, (_, v) in zip(roles, inputs, strict=True)
    ]


def _is_condition(value: Tensor, found: bool) -> bool:
    """Whether an input that nothing else is known of is no latent: a single number (a scale, or the strength of a
    condition), a label, a mask; words and codes too, where the latent is ``found`` elsewhere."""
    if value.is_floating_point() or value.is_complex():
        return value.ndim == 0
    return found or value.ndim <= 1 or value.dtype is torch.bool


def _refuse_equals(times: Sequence[tuple[str, Tensor]]) -> None:
    """BadInput where another input looks like the first of ``times``: same shape, numbers of the same kind."""
    name, first = times[0]
    alike = [n for n, v in times if v.shape == first.shape and v.is_floating_point() == first.is_floating_point()]
    if len(alike) > 1:
        kind = f"{str(first.dtype).removeprefix('torch.')}{list(first.shape)}"
        raise BadInput(
            f"the inputs {', '.join(alike)} (all {kind}) could each be the time of the step, and no name tells; pass "
            f"roles={{'{name}': 'timestep', '{alike[1]}': 'prompt'}} or the other way round (roles are "
            f"{', '.join(get_args(Role))})"
        )


def _by_name(name: str) -> Role | None:
    """By the argument's name, or where that says nothing, by those of what it is in the argument."""
    return next(filter(None, map(_by_word, words(name))), None)


def _by_word(word: str) -> Role | None:
    if _TIME.search(word):
        return "timestep"
    if _LATENT.search(word) and not re.search(r"encoder|text|txt|prompt|caption|global|cond_hidden", word):
        return "latent"
    if _SHAPE.search(word) and not _TOKENS.search(word):
        return "shape"
    if _PROMPT.search(word) or word.endswith("mask"):
        return "prompt"
    return None
