"""What repair refuses."""


class RepairError(ValueError):
    """A repair that makes no sense or cannot go on; the message says why and what to do."""
