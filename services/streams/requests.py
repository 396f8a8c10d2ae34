"""What a planned sample needs of the recipe's encoder."""

from __future__ import annotations

from typing import Any

from configs import RunConfig
from services.contracts import FeatureRequest, PlanSample
from services.features.requests import feature_requests


def sample_requests(sample: PlanSample, manifest: Any, config: RunConfig) -> list[FeatureRequest]:
    """Requests to the encoder ``recipe.features``, in the order of the views; none for a sample without pictures.

    DataError when the sample names views that its scene does not have.
    """
    if not sample.views:
        return []
    return feature_requests(sample, manifest, config.recipe.features, config)
