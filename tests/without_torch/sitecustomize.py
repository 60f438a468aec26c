"""Processes that tests start find no torch: nothing in them needs it, and transformers would import it as a whole."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
