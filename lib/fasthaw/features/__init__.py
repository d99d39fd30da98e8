"""Cached features: what a frozen prefix computes is the same in every epoch, so it is computed once an item."""

from .serving import CachedFeatures as CachedFeatures
from .serving import cache_of as cache_of
from .serving import cached_features as cached_features
from .settings import CacheReport as CacheReport
