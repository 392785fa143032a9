"""Tiny denoisers of the classes that diffusers ships: 95 classes and variants, random weights, no network.

``REGISTRY[name].build()`` gives a model and the keyword arguments of one call. Nothing here is read by name in ditopt.
"""

from tests.denoisers import cross_attention, image_more, joint_attention, other, tokens, video, video_cached, video_more
from tests.denoisers.base import REGISTRY, Denoiser

__all__ = [
    "REGISTRY",
    "Denoiser",
    "cross_attention",
    "image_more",
    "joint_attention",
    "other",
    "tokens",
    "video",
    "video_cached",
    "video_more",
]
