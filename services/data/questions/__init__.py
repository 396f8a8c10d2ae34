"""Questions with exact answers, referring expressions and captions from a scene's instances and views.

The eight question types of VSI-Bench (Yang et al., CVPR 2025) under their published names: ``numeric`` and ``choice``
and ``route`` make drafts from the ``facts`` of a scene, ``balance`` selects among those of a whole source and deals the
letters, ``blind`` measures what is left to guess, ``write`` puts everything into files.
"""

from __future__ import annotations

from services.data.questions.blind import BlindScore, blind_scores
from services.data.questions.write import Annotations, annotate, run_questions, write_annotations

__all__ = ["Annotations", "BlindScore", "annotate", "blind_scores", "run_questions", "write_annotations"]
