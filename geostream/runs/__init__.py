"""Start, resume, log and stop training runs, and do the stages between their epochs."""
