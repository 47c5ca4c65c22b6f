"""Checkpoints within a stage: when to write one, and how to continue from it."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from cpugrpo_edu.engine import ranks
from cpugrpo_edu.engine.guard import Guard, RolloutTally
from cpugrpo_edu.engine.int8 import Drift
from cpugrpo_edu.engine.memory import memory_alarm
from cpugrpo_edu.engine.trl_trainer import CPUGRPOTrainer
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.files import flush, write_text
from cpugrpo_edu.run.checkpoints import MARK


class CheckpointSaver(TrainerCallback):
    """Writes a checkpoint every few minutes, and at once when memory is about to run out.

    Optimizer, scheduler and random states are TRL's. ``complete.json``, written last, says
    that all of it is on disk, and holds the tallies that TRL does not keep; then older
    checkpoints are deleted. Several processes decide together, and rank 0 writes the mark;
    ``traffic`` counts the gradient bytes that they exchange.
    """

    def __init__(self, trainer: CPUGRPOTrainer, folder: Path, minutes: float):
        self.trainer, self.folder, self.minutes = trainer, folder, minutes
        self.saved = time.monotonic()
        self.alarmed = False
        self.traffic = ranks.Traffic()
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if ranks.size() > 1:
            self.traffic.watch(self.trainer.model_wrapped)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.saved >= 60 * self.minutes:
            control.should_save = True
        alarm = memory_alarm()
        if alarm and not self.alarmed:
            self.trainer.say(f"{alarm}; saving a checkpoint now")
            control.should_save = True
        self.alarmed = alarm is not None
        control.should_save = ranks.agree(control.should_save)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tally = RolloutTally.of_all(ranks.gather(self.trainer.tally))
        ranks.on_main(lambda: self.complete(state.global_step, tally))
        self.saved = time.monotonic()

    def complete(self, step: int, tally: RolloutTally) -> None:
        """Mark the checkpoint of ``step`` as complete, and delete the older ones."""
        checkpoint = self.folder / f"checkpoint-{step}"
        # TRL's settings, a pickle: resuming does not read them, and we never load a pickle
        (checkpoint / "training_args.bin").unlink(missing_ok=True)
        flush(checkpoint)
        drift = self.trainer.drift
        kept = {
            "tally": asdict(tally),
            "guard": asdict(self.trainer.guard),
            # A resumed stage samples from the same copy, whatever a new measurement would say.
            "copy": [self.trainer.copy_kind, drift and asdict(drift)],
        }
        write_text(checkpoint / MARK, json.dumps(kept))
        for other in self.folder.glob("checkpoint-*"):
            if other != checkpoint:
                shutil.rmtree(other, ignore_errors=True)

    def restore(self) -> Path | None:
        """The last complete checkpoint, if any, its tallies back in the trainer.

        Incomplete checkpoints are deleted.
        """
        found = list(self.folder.glob("checkpoint-*"))
        complete = [checkpoint for checkpoint in found if (checkpoint / MARK).exists()]
        last = max(complete, key=step_of, default=None)
        if len(set(ranks.gather(last and last.name))) > 1:
            raise UserError(
                f"the processes see different checkpoints in {self.folder}; "
                "--output must be a folder that all machines share"
            )
        for checkpoint in found:
            if checkpoint not in complete and ranks.is_main():
                shutil.rmtree(checkpoint, ignore_errors=True)
        if last is not None:
            kept = json.loads((last / MARK).read_text(encoding="utf-8"))
            if ranks.is_main():  # it is the sum over all ranks, so only one may hold it
                self.trainer.tally = RolloutTally(**kept["tally"])
            self.trainer.guard = Guard(**kept["guard"])
            self.trainer.copy_kind, drift = kept["copy"]
            self.trainer.drift = drift and Drift(**drift)
        return last


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])
