"""The list of studies, for the command line and the book. A study's module is imported on use."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.studies.setting import Setting, StudyResult, Table
from cpugrpo_edu.record.run_record import RunRecord


@dataclass(frozen=True)
class Study:
    """Its module has ``run(setting)``, and ``tables``, ``findings`` and ``plot`` of a record."""

    name: str
    question: str
    takes: tuple[str, ...] = ()
    """Which of the optional settings it understands: models, seeds, only."""

    @property
    def module(self) -> str:
        return f"cpugrpo_edu.lab.studies.{self.name.replace('-', '_')}"

    def load(self) -> Any:
        return importlib.import_module(self.module)

    def run(self, setting: Setting) -> StudyResult:
        """UserError for a setting that the study does not take."""
        for field in ("models", "seeds", "only"):
            if getattr(setting, field) and field not in self.takes:
                option = "model" if field == "models" else field
                raise UserError(
                    f"the study {self.name} takes no --{option}; leave it out"
                    + (f", it takes --{', --'.join(self.takes)}" if self.takes else "")
                )
        result: StudyResult = self.load().run(setting)
        return result

    def tables(self, record: RunRecord) -> list[Table]:
        found: list[Table] = self.load().tables(record)
        return found


STUDIES = {
    study.name: study
    for study in (
        Study(
            "quantization",
            "What do fewer bits cost in accuracy, and can the cost be predicted?",
            ("models", "seeds"),
        ),
        Study(
            "chat-formats",
            "What do fewer bits cost a real chat model, before and after GRPO?",
            ("models",),
        ),
        Study(
            "cpu-or-gpu",
            "What does a class need in time, energy and money, and when does a GPU pay off?",
        ),
        Study(
            "ablations",
            "What does each part of the recipe contribute, at equal compute?",
            ("seeds", "only"),
        ),
        Study(
            "generalisation",
            "Does training on one domain or difficulty help the others?",
            ("seeds",),
        ),
        Study(
            "forgetting",
            "What do five tasks in a row forget, and what do springs and replay keep?",
            ("seeds",),
        ),
        Study(
            "letters",
            "Does EWC keep what training on something else would erase?",
            ("seeds",),
        ),
        Study(
            "real-model",
            "Does GRPO teach a real chat model, or sharpen it?",
            ("models", "seeds", "only"),
        ),
    )
}


def study_named(name: str) -> Study:
    """The study, or UserError that lists them."""
    if name not in STUDIES:
        raise UserError(f"unknown study {name!r}; allowed are {', '.join(STUDIES)}")
    return STUDIES[name]
