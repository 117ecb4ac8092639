"""The texts of the user that a run works with: seeds, reference and evaluation rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from montessori.data import Rows, load_rows
from montessori.errors import DataError
from montessori.loop import generate
from montessori.loop.config import Config, data_path
from montessori.loop.preflight import check_apart
from montessori.loop.prompts import instruction_text, user_turns


@dataclass(frozen=True)
class Material:
    """Read and checked: no evaluation row asks what a reference row asks, and no seed what one of either does."""

    seeds: list[str]
    reference: Rows
    evaluation: Rows

    @classmethod
    def read(cls, config: Config) -> Material:
        data = config.data
        seeds = instruction_text(load_rows(data_path(data.seeds), name="seeds"))
        reference = load_rows(data_path(data.reference), name="reference")
        used = len(reference) if data.reference_rows is None else min(data.reference_rows, len(reference))
        evaluation = reference.part(used)
        if data.evaluation is not None:
            evaluation = load_rows(data_path(data.evaluation), name="evaluation")
        if not evaluation:
            raise DataError(
                f"{evaluation.source}: {len(reference)} rows and data.reference_rows={data.reference_rows} leave none "
                "for evaluation: lower it, or give data.evaluation"
            )
        material = cls(seeds, reference.part(0, used), evaluation.part(0, data.evaluation_rows))
        check_apart(material.evaluation, material.reference, config.split.leakage)
        generate.check_leakage(seeds, material.held_out, config.split.leakage)
        return material

    @cached_property
    def held_out(self) -> list[str]:
        """All that the user asks in the reference and the evaluation set."""
        return [text for rows in (self.reference, self.evaluation) for turns in user_turns(rows) for text in turns]
