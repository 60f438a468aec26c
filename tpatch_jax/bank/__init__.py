"""Patches that last: one folder with a journal, which survives crashes and gives every edit back."""
