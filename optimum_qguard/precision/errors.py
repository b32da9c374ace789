"""What precision refuses."""


class PrecisionError(ValueError):
    """A bit width, a bit map or a model that precision cannot work with. The message says why and what to do."""
