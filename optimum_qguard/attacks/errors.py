"""What the laboratory refuses."""


class AttackError(ValueError):
    """An attack that cannot be run, or did not come off. The message says why and what to do."""
