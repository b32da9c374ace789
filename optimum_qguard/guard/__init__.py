"""Guard: randomize rounding by the quantizer's own cells before the quantizer sees the weights.

``config`` is what a user writes, ``noise`` the mathematics of one tensor, ``random`` its unforeseeable bits,
``outliers`` what is taken out before, ``quantizer`` the hook into transformers, ``backends`` what each quantization
library does, ``report`` what was done.
"""
