"""Examples of the tasks."""
