"""What the demo, benchmarks and tests measure with.

The model and the text come from here; what is measured comes from the file named after it, as in
``from optimum_qguard.evaluate.perplexity import kl_divergence, perplexity``.
"""

from __future__ import annotations

from optimum_qguard.evaluate.smollm2 import smollm2_path
from optimum_qguard.evaluate.text import standard_library_text

__all__ = ["smollm2_path", "standard_library_text"]
