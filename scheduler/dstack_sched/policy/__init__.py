"""Pure mathematics: latency model, knee, batch program, placement, bounds."""
