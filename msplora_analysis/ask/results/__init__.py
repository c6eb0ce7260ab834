"""What runs scored: from the run.json of every run to a table of methods and tasks, ready for a paper."""
