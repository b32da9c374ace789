"""Carries results to the Hugging Face Hub: what the model card says of them, uploading, and a bot that scans uploads.

>>> from optimum_qguard.hub import push
>>> push("guarded", "org/model", private=True)                 # doctest: +SKIP
"""

from __future__ import annotations

from optimum_qguard.checkpoint.publish import Published
from optimum_qguard.hub.push import push

__all__ = ["Published", "push"]
