"""Answers to pictures and pages: figures, the report, the terminal, notebooks."""
