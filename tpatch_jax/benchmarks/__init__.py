"""What editing costs, measured: ``tpatch bench``."""
