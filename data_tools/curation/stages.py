"""Lays the steps of a recipe out as stages: pipelines of datatrove blocks, each done by all tasks before the next.

Steps that look at one document share a pipeline; those that compare documents end it. Where they run is local.py's and
cluster.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont.n_grams import NGramsDecontFilter
from datatrove.pipeline.dedup.exact_dedup import ExactDedupFilter, ExactFindDedups
from datatrove.pipeline.dedup.minhash import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)

from data_tools.curation.accounting import Account, DropLog, Meter, SaveAccounts
from data_tools.curation.document_files import ReadBetween, ReadInputs, WriteDocuments
from data_tools.curation.document_filters import build_filter
from data_tools.curation.duplicates import (
    FirstWinsSignature,
    IndexEvaluationTexts,
    decontamination_config,
    exact_config,
    minhash_config,
)
from data_tools.curation.recipe import (
    ControlCharacters,
    Decontamination,
    Emoji,
    ExactDuplicates,
    NearDuplicates,
    Placeholders,
    Recipe,
    Section,
    Unicode,
)
from data_tools.curation.text_steps import control_character_step, emoji_step, placeholder_step, unicode_step
from data_tools.curation.words import RegexWordTokenizer
from data_tools.documents import Keys
from data_tools.pieces import Piece
from data_tools.ranges import Task

READING = -1  # the step before the first one of the recipe
TASKS_PER_FINDER = 64  # of exact deduplication: one finder merges the signatures of a part of all hashes
OUTPUT = "output"
NUMBERS = "numbers"
READ = "read"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pipeline and the number of tasks that run it."""

    name: str
    tasks: int
    pipeline: list[PipelineStep]


@dataclass(kw_only=True)
class StagePlan:
    """Builds the stages of a recipe in a work folder."""

    recipe: Recipe
    tasks: Sequence[Task]
    evaluation: dict[int, list[Piece]]  # step -> files with texts of evaluations
    work: Path
    stages: list[Stage] = field(default_factory=list)
    _pipeline: list[PipelineStep] = field(default_factory=list)
    _accounts: list[Account] = field(default_factory=list)
    _meter: Meter = field(default_factory=Meter)
    _segments: int = 0
    _words: RegexWordTokenizer = field(default_factory=RegexWordTokenizer)

    def build(self) -> list[Stage]:
        """Return the stages in order.

        Raises:
            UsageError: a step needs what is not there.
        """
        self._begin_with_inputs()
        for number, step in enumerate(self.recipe.steps):
            drops = DropLog(step.step.replace("_", " "), self.recipe.samples_per_reason)
            if isinstance(step, ExactDuplicates):
                self._exact_duplicates(number, drops)
            elif isinstance(step, NearDuplicates):
                self._near_duplicates(number, step, drops)
            else:
                if isinstance(step, Decontamination):
                    self._index_evaluation(number, step)
                self._add(number, self._block(number, step, drops), drops)
        self._end_segment(WriteDocuments(self.work / OUTPUT, self.recipe.compression, is_final=True), "write")
        return self.stages

    def _begin_with_inputs(self) -> None:
        inputs = self.recipe.inputs
        keys = Keys(
            text=inputs.text_key,
            identifier=inputs.id_key,
            metadata=tuple(inputs.metadata),
            longest_bytes=inputs.max_document_bytes,
        )
        records, drops = Meter(), DropLog("bad record", self.recipe.samples_per_reason)
        reader = ReadInputs(self.tasks, keys, inputs.policy, self.work / READ, records, drops)
        self._meter = records
        self._add(READING, reader, drops)

    def _block(self, number: int, step: Section, drops: DropLog) -> PipelineStep:
        """Return the block of a step that looks at one document at a time."""
        if isinstance(step, Unicode):
            return unicode_step(step, drops)
        if isinstance(step, ControlCharacters):
            return control_character_step(step, drops)
        if isinstance(step, Placeholders):
            return placeholder_step(step, drops)
        if isinstance(step, Emoji):
            return emoji_step(step, drops)
        if isinstance(step, Decontamination):
            config = decontamination_config(step)
            index = str(self.work / f"{number:02d}-index")
            return NGramsDecontFilter(index, config, exclusion_writer=drops, language=self._words)
        return build_filter(step, drops, self._words)  # type: ignore[arg-type]

    def _add(self, number: int, block: PipelineStep, drops: DropLog) -> None:
        after = Meter()
        self._accounts.append(Account(step=number, before=self._meter, block=block, drops=drops, after=after))
        self._pipeline += [block, after]
        self._meter = after

    def _end_segment(self, writer: WriteDocuments, name: str, *further: PipelineStep) -> None:
        """Finish a pipeline: write its documents, save its accounts, and whatever looks at the documents then."""
        numbers = SaveAccounts(self._accounts, self.work / NUMBERS / f"{self._segments:02d}")
        pipeline = [*self._pipeline, writer, numbers, *further]
        self.stages.append(Stage(name=name, tasks=len(self.tasks), pipeline=pipeline))
        self._segments += 1
        # the next pipeline runs in other processes: its counters begin at nothing
        self._pipeline, self._accounts, self._meter = [], [], Meter()

    def _begin_segment(self, documents: Path) -> None:
        self._pipeline = [ReadBetween(documents), self._meter]

    def _exact_duplicates(self, number: int, drops: DropLog) -> None:
        place = self.work / f"{number:02d}-exact"
        documents, signatures, found = place / "documents", str(place / "signatures"), str(place / "duplicates")
        config = exact_config()
        finders = 1 + (len(self.tasks) - 1) // TASKS_PER_FINDER
        signature = FirstWinsSignature(signatures, config, finder_workers=finders)
        self._end_segment(WriteDocuments(documents), f"{number:02d}-exact-signatures", signature)
        finder = ExactFindDedups(signatures, found, config, lines_to_buffer=1000)
        self.stages.append(Stage(name=f"{number:02d}-exact-find", tasks=finders, pipeline=[finder]))
        self._begin_segment(documents)
        drops.default_reason = "the same text came before"
        self._add(number, ExactDedupFilter(found, config, exclusion_writer=drops), drops)

    def _near_duplicates(self, number: int, step: NearDuplicates, drops: DropLog) -> None:
        place = self.work / f"{number:02d}-near"
        documents, signatures = place / "documents", str(place / "signatures")
        pairs, removed = str(place / "pairs"), str(place / "removed")
        config = minhash_config(step, self.recipe.seed)
        signature = MinhashDedupSignature(signatures, config, language=self._words)
        self._end_segment(WriteDocuments(documents), f"{number:02d}-near-signatures", signature)
        buckets = MinhashDedupBuckets(signatures, pairs, config=config, lines_to_buffer=1000)
        self.stages.append(Stage(name=f"{number:02d}-near-buckets", tasks=step.buckets, pipeline=[buckets]))
        cluster = MinhashDedupCluster(pairs, removed, config, lines_to_buffer=1000)
        self.stages.append(Stage(name=f"{number:02d}-near-cluster", tasks=1, pipeline=[cluster]))
        self._begin_segment(documents)
        drops.default_reason = "much like another document"
        self._add(number, MinhashDedupFilter(removed, exclusion_writer=drops), drops)

    def _index_evaluation(self, number: int, step: Decontamination) -> None:
        index = IndexEvaluationTexts(step, self.evaluation[number], self.work / f"{number:02d}-index", self._words)
        self.stages.insert(0, Stage(name=f"{number:02d}-index", tasks=1, pipeline=[index]))
