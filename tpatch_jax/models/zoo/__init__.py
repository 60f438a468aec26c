"""One file per family of decoders: how its configuration and its checkpoint names map onto ours."""
