"""The score of a run on one MTEB task: scores/TASK.json, with everything that changes a score."""

from dataclasses import dataclass
from typing import Any

from embedscale.values import Amount, Count, Value


@dataclass(frozen=True)
class Score(Value):
    """What MTEB found for a run on a task."""

    task: str
    """Name of the task."""
    type: str
    """Kind of the task, such as Retrieval or STS."""
    score: float
    """Value of the main score, over all splits."""
    main_score: str
    """Name of the main score, such as ndcg_at_10."""
    scores: dict[str, Any]
    """All of MTEB's scores: a list of rows for each split."""
    run_id: str
    """Name of the run."""
    weights_digest: str
    """Digest of the trained weights."""
    dataset_revision: str
    """Revision of the task's data."""
    mteb: str
    """Version of the package mteb."""
    precision: str
    """Number format of the matrix products: float32, tf32 or bf16."""
    context: Count
    """Tokens after which a text is cut."""
    seconds: Amount
    """Duration of the scoring."""
    time: str
    """Time at which the scoring ended, ISO 8601."""
    prompts: Any = None
    """Prompts put before the texts: none."""
