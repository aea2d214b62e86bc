"""Numbers and times as one reads them: 4.47 M, 2 min 40 s."""


def readable_number(value: float) -> str:
    """12345678 -> '12.3 M'; small whole numbers stay as they are."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.3g} {unit}"
    return f"{value:.4g} " if isinstance(value, float) else f"{value} "


def readable_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
