"""Write what a person reads of a run: its report, and a page for each evaluation."""
