"""ROME, R-ROME and MEMIT: closed-form updates of down projections."""
