"""The two ways of fitting one patch: `joint`, the paper's, and `staged`, this library's."""
