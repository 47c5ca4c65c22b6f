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
    """One row for each student and one column for each assignment; empty where none was graded."""

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
                    writer.writerow(row + [points(marks[n].get(student.id)) for n in chosen])

    def describe(self, student: Student) -> list[str]:
        if self.platform == "moodle":
            return [student.id, student.email or ""]
        if self.platform == "plain":
            return [student.id]
        name = ", ".join(part for part in (student.last_name, student.first_name) if part)
        return [name or student.id, student.lms_user_id or "", student.id, student.id, ""]


def points(submission: SubmittedAssignment | None) -> str:
    """Score less a late penalty, by nbgrader's own rule."""
    if submission is None:
        return ""
    return f"{max(0.0, submission.score - submission.late_submission_penalty):g}"


def unformula(text: str) -> str:
    """A spreadsheet would execute a name that begins like a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "@", "\t") else text
