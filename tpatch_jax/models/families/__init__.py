"""One file per family: how its configuration and its checkpoint names map onto ours."""
