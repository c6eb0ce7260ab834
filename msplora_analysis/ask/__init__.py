"""Tables to answers: findings, comparisons of methods, results of runs."""
