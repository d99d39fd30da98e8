"""Cached features: what a frozen prefix computes is the same in every epoch, so it is computed once an item."""

from .extract import Features as Features
from .extract import extract_features as extract_features
from .extract import save_features as save_features
from .serving import CachedFeatures as CachedFeatures
from .serving import cache_of as cache_of
from .serving import cached_features as cached_features
from .settings import CacheReport as CacheReport
