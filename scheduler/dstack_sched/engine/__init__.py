"""The spatio-temporal scheduler and its rivals: handle(event, now_us) -> decisions."""
