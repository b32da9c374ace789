"""What an attack refuses."""


class AttackError(RuntimeError):
    """An attack that cannot be made as asked, or that failed; the message says why and what to do."""
