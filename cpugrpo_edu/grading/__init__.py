"""Assigning and grading: what instructors run on top of nbgrader."""
