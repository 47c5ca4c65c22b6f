"""Grading with nbgrader: a course folder, contained execution, feedback that gives nothing away.

``course`` holds the steps an instructor takes, ``execute`` runs one notebook cell by cell,
``sandbox`` shuts its kernel in, ``guard`` is what looks for tampering inside the kernel.
"""
