"""Denoisers as people write them outside diffusers, none of which ditopt has ever heard of."""

from tests.foreign import conditioned, guided, image, positions, routed, video

ZOO = {f.name: f for part in (image, positions, routed, video, conditioned, guided) for f in part.MODELS}
