"""Grading with nbgrader: a course folder, contained execution, feedback that gives nothing away.

``course`` has the steps that an instructor takes and ``autograde`` the grading. For that,
``execute`` runs a notebook cell by cell, ``sandbox`` contains its kernel, and ``guard`` looks for
tampering inside the kernel. ``student_seeds`` gives each student's hidden tests their own data.
"""
