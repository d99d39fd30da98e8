"""Cached features: what a frozen prefix computes is the same in every epoch, so it is computed once an item."""

from .callback import CachedFeatures as CachedFeatures
from .callback import cached_features as cached_features
from .fill import CacheReport as CacheReport
