"""The ``tpatch bank …`` commands, one in each file."""
