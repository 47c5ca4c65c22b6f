"""The list of studies, for the command line and the book. Modules are imported when run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.studies.common import Outcome, Setting
from cpugrpo_edu.record.run_record import RunRecord


@dataclass(frozen=True)
class Study:
    """``module`` has ``run(setting)``, and ``tables``, ``findings`` and ``plot`` of a record."""

    name: str
    question: str
    module: str
    takes: tuple[str, ...] = ()
    """Which of the optional settings it understands: models, seeds, only."""

    def load(self) -> Any:
        return importlib.import_module(self.module)

    def run(self, setting: Setting) -> Outcome:
        for option, value in (
            ("models", setting.models),
            ("seeds", setting.seeds),
            ("only", setting.only),
        ):
            if value and option not in self.takes:
                name = option.removesuffix("s") if option == "models" else option
                raise UserError(
                    f"the study {self.name} takes no --{name}; leave it out"
                    + (f", it takes --{', --'.join(self.takes)}" if self.takes else "")
                )
        outcome: Outcome = self.load().run(setting)
        return outcome

    def tables(self, record: RunRecord) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, header and rows of each table."""
        found: list[tuple[str, list[str], list[list[str]]]] = self.load().tables(record)
        return found


STUDIES = {
    study.name: study
    for study in (
        Study(
            "quantization",
            "What do fewer bits cost in accuracy, and can the cost be foretold?",
            "cpugrpo_edu.lab.studies.quantization",
            ("models", "seeds"),
        ),
        Study(
            "cpu-or-gpu",
            "What does a class need in time, energy and money, and when does a GPU pay?",
            "cpugrpo_edu.lab.studies.cpu_or_gpu",
        ),
        Study(
            "ablations",
            "Which part of the recipe earns what, at equal compute?",
            "cpugrpo_edu.lab.studies.ablations",
            ("seeds", "only"),
        ),
        Study(
            "generalisation",
            "Does training on one domain or difficulty help the others?",
            "cpugrpo_edu.lab.studies.generalisation",
            ("seeds",),
        ),
    )
}


def study_named(name: str) -> Study:
    """The study, or UserError naming those there are."""
    if name not in STUDIES:
        raise UserError(f"unknown study {name!r}; allowed are {', '.join(STUDIES)}")
    return STUDIES[name]
