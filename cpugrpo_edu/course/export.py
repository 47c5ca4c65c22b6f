"""Grades as a CSV file that a learning platform imports: an export plugin for nbgrader.

``cpugrpo assign export`` uses it; so can ``nbgrader export --to grades.csv
--exporter=cpugrpo_edu.course.export.PlatformExport --PlatformExport.platform=moodle``.
"""

from __future__ import annotations

import csv
from pathlib import Path

from nbgrader.api import Gradebook, Student, SubmittedAssignment
from nbgrader.plugins import ExportPlugin
from traitlets import Enum

HEADS = {
    "canvas": ["Student", "ID", "SIS User ID", "SIS Login ID", "Section"],
    "moodle": ["ID number", "Email address"],
    "plain": ["student"],
}


class PlatformExport(ExportPlugin):
    """One row for each student and one column for each assignment; empty where none was graded.

    What was handed in and could not be graded is "not graded" in a plain file, and empty in one
    for a platform, which would take neither the words nor a 0 that nobody gave.
    """

    platform = Enum(list(HEADS), "canvas", help="the format of the CSV file").tag(config=True)

    def export(self, gradebook: Gradebook) -> None:
        chosen = self.assignment or [each.name for each in gradebook.assignments]
        marks = {
            name: {each.student_id: each for each in gradebook.assignment_submissions(name)}
            for name in chosen
        }
        with Path(self.to or "grades.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*HEADS[self.platform], *chosen])
            if self.platform == "canvas":
                best = [max((s.max_score for s in marks[n].values()), default=0) for n in chosen]
                writer.writerow(["Points Possible", "", "", "", "", *(f"{b:g}" for b in best)])
            for student in sorted(gradebook.students, key=lambda each: str(each.id)):
                if not self.student or student.id in self.student:
                    row = [unformula(field) for field in self.describe(student)]
                    row += [self.points(marks[name].get(student.id)) for name in chosen]
                    writer.writerow(row)

    def points(self, submission: SubmittedAssignment | None) -> str:
        """Score less a late penalty, by nbgrader's own rule."""
        if submission is None:
            return ""
        if not_graded(submission):
            return "not graded" if self.platform == "plain" else ""
        return f"{max(0.0, submission.score - submission.late_submission_penalty):g}"

    def describe(self, student: Student) -> list[str]:
        if self.platform == "moodle":
            return [student.id, student.email or ""]
        if self.platform == "plain":
            return [student.id]
        name = ", ".join(part for part in (student.last_name, student.first_name) if part)
        return [name or student.id, student.lms_user_id or "", student.id, student.id, ""]


def not_graded(submission: SubmittedAssignment) -> bool:
    """Whether a test has no points yet: it could not run, or a person has to decide."""
    return any(
        grade.auto_score is None and grade.manual_score is None
        for notebook in submission.notebooks
        for answers in [{cell.name for cell in notebook.notebook.solution_cells}]
        for grade in notebook.grades
        if grade.cell_type == "code" and grade.name not in answers
    )


def unformula(text: str) -> str:
    """A spreadsheet would execute a name that begins like a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "@", "\t") else text
