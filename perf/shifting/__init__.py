"""The study of rates that shift every minute: what is asked, who sends it, who plans, what came of it."""
