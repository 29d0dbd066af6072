"""Lengths of time in words, in every table, card and line of the commands alike."""


def duration(seconds: float) -> str:
    """Seconds as a person reads them: `0.21 s`, `45 s`, `12 min`, `3.4 h`, `2.1 days`."""
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    for unit, length, most in (("min", 60, 120), ("h", 3600, 72)):
        if seconds / length < most:
            amount = seconds / length
            return f"{amount:.1f} {unit}" if amount < 9.95 else f"{amount:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"
