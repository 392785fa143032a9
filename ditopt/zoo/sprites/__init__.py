"""The video model: sprites that move over a textured ground."""
