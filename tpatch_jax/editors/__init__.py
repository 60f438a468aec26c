"""Editing methods behind one interface."""
